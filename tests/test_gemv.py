"""The matmul of one row: as right as cuBLAS, the same every time, captured; and what it leaves to cuBLAS."""

import pytest
import torch

pytest.importorskip("triton")

from maco_lib.kernels.gemv import MIN_ROWS, for_gemv, gemv

# (N, K): whole tiles, and some that no tile divides.
SIZES = [(4096, 2048), (5120, 12800), (2049, 272), (17001, 48)]


def operands(n: int, k: int, dtype: torch.dtype, device: str = "cuda") -> tuple[torch.Tensor, ...]:
    """x, weight, whose rows are followed by elements that are none of theirs, and a bias."""
    generator = torch.Generator(device).manual_seed(n + k)
    normal = lambda *shape: torch.randn(*shape, generator=generator, device=device).to(dtype)  # noqa: E731
    return normal(1, k), normal(n, k + 16)[:, :k], normal(n)


def error(product: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return float((product.double() - exact).norm() / exact.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_as_right_as_cublas_and_the_same_every_time(dtype):
    for size in SIZES:
        x, weight, some = operands(*size, dtype)
        assert for_gemv(x, weight)
        for bias in (None, some):
            product, reference = gemv(x, weight, bias), torch.nn.functional.linear(x, weight, bias)
            assert product.shape == reference.shape and product.dtype == dtype
            assert error(product, x, weight, bias) <= 1.01 * error(reference, x, weight, bias) + 1e-6, (size, bias)
            assert all(torch.equal(gemv(x, weight, bias), product) for _ in range(20))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = gemv(x, weight, some)
    x.neg_()
    graph.replay()
    assert torch.equal(result, gemv(x, weight, some))


def test_it_is_not_for_several_rows_other_types_few_weights_or_cpus():
    x, weight, _ = operands(MIN_ROWS, 64, torch.bfloat16, "cpu")
    assert not for_gemv(x, weight)


@pytest.mark.gpu
def test_what_it_would_read_slowly_is_left_to_cublas():
    x, weight, _ = operands(MIN_ROWS, 64, torch.bfloat16)
    assert for_gemv(x, weight)
    odd = torch.zeros(MIN_ROWS * 73, device="cuda", dtype=torch.bfloat16)
    for wrong in (odd.view(MIN_ROWS, 73)[:, :64], odd[1 : 1 + MIN_ROWS * 64].view(MIN_ROWS, 64), weight[1:]):
        assert not for_gemv(x, wrong)
    assert not for_gemv(torch.zeros(2, 64, device="cuda", dtype=torch.bfloat16), weight)
    assert not for_gemv(x.float(), weight.float())
