"""The matmul for decoding: as right as cuBLAS at any size, the same every time, captured, launched early."""

import functools
import itertools

import pytest
import torch

pytest.importorskip("triton")

from maco_lib.kernels.decode_matmul import MAX_SPLITS, MAX_TILES, TILE, Tile, decodable, decode_matmul, num_splits

# (M, N, K): one share and many, and M, N and K that no tile divides.
SIZES = [(1, 4096, 2048), (16, 5120, 12800), (3, 100, 264), (1, 1, 8), (33, 999, 72), (64, 8192, 1024), (5, 17001, 40)]
TILES = [TILE, Tile(32, 128, 2, 4)]


class Example:
    """Operands of which each row is followed by 8 elements that are none of theirs."""

    def __init__(self, m, n, k, dtype, seed=0, bias=True):
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

        self.x, self.weight = normal(m, k + 8)[:, :k], normal(n, k + 8)[:, :k]
        self.bias = normal(n) if bias else None

    def error(self, product) -> float:
        exact = self.x.double() @ self.weight.double().t()
        exact = exact if self.bias is None else exact + self.bias.double()
        return float((product.double() - exact).norm() / exact.norm())


def arrivals():
    return torch.zeros(MAX_TILES, dtype=torch.int32, device="cuda")


def test_shares_make_one_wave_of_ctas():
    per_sm = 2
    for n, k in ((4096, 2048), (5120, 12800), (8192, 14336)):
        splits = num_splits(n, k, 16, TILE, 132)
        assert 1 <= splits <= MAX_SPLITS and splits * n // TILE.rows <= per_sm * 132 < (splits + 1) * n // TILE.rows
    assert num_splits(64, TILE.columns, 16, TILE, 132) == 1
    assert num_splits(MAX_TILES * TILE.rows + 1, 2**20, 16, TILE, 132) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("early", [False, True])
def test_decode_matmul_is_as_right_as_cublas_and_the_same_every_time(early):
    arrived = arrivals()
    for (size, dtype), bias, tile in itertools.product(
        itertools.product(SIZES, (torch.bfloat16, torch.float16)), (False, True), TILES
    ):
        example = Example(*size, dtype, bias=bias)
        assert decodable(example.x, example.weight)
        run = functools.partial(
            decode_matmul, example.x, example.weight, example.bias, arrived=arrived, tile=tile, early=early
        )
        product = run()
        reference = torch.nn.functional.linear(example.x, example.weight, example.bias)
        assert product.shape == reference.shape and product.dtype == dtype
        assert example.error(product) <= 1.01 * example.error(reference) + 1e-6, (size, dtype, bias, tile)
        assert all(torch.equal(run(), product) for _ in range(20)), (size, dtype, bias, tile)
    assert not arrived.any()


@pytest.mark.gpu
def test_decode_matmul_is_captured_and_fed_by_the_kernel_before():
    """A chain of products in a graph, each of which is launched before the one it reads is there."""
    arrived = arrivals()
    weights = [torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) / 64 for _ in range(4)]

    def run(x, early):
        for weight in weights * 5:
            x = decode_matmul(x, weight, arrived=arrived, early=early)
        return x

    x = torch.randn(7, 4096, device="cuda", dtype=torch.bfloat16)
    wanted = run(x, False)
    assert torch.equal(run(x, True), wanted)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(x, True)
    for _ in range(10):
        result.zero_()
        graph.replay()
        assert torch.equal(result, wanted)
    x.mul_(2)
    graph.replay()
    assert torch.equal(result, run(x, False)) and not arrived.any()


@pytest.mark.gpu
def test_what_it_cannot_read_at_full_speed_is_not_for_it():
    good = Example(4, 64, 64, torch.bfloat16)
    odd = torch.zeros(64, 73, device="cuda", dtype=torch.bfloat16)
    for wrong in (odd[:, :64], odd.view(-1)[1:4097].view(64, 64), good.weight.contiguous().t()):
        assert not decodable(good.x, wrong)
    assert not decodable(torch.zeros(65, 64, device="cuda", dtype=torch.bfloat16), good.weight)
    assert not decodable(good.x.float(), good.weight.float())
