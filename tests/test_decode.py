"""The matmul of few rows that sends its product: as right as cuBLAS, the same every time, at any size, back to back."""

import itertools

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings")

from maco_lib.kernels.decode import decode, fits, readable
from maco_lib.kernels.decode_tiles import MAX_ROWS
from maco_lib.kernels.inbox import INBOX_BYTES, Box

EPS = 1e-6
# (M, N, K): tiles of one stage and of many, several to a CTA, and M, N and K that nothing divides.
SIZES = [
    (1, 4096, 2048), (16, 5120, 12800), (7, 8192, 72), (33, 1000, 136), (64, 8192, 4096), (5, 24, 40), (2, 17000, 2077),
    (9, 20000, 512), (64, 4, 8), (3, 128, 28000),
]  # fmt: skip


class Example:
    """Operands, of which each row is followed by elements that are none of theirs, and an inbox of our own."""

    def __init__(self, m: int, n: int, k: int, dtype: torch.dtype, bias: bool = True):
        generator = torch.Generator("cuda").manual_seed(m + n + k)
        draw = lambda *shape: torch.randn(*shape, generator=generator, device="cuda").to(dtype)  # noqa: E731
        pitch = -(-k // 8) * 8 + 8
        self.x, self.weight = draw(m, pitch)[:, :k], draw(n, pitch)[:, :k]
        self.bias = draw(n) if bias else None
        self.zeros = torch.zeros(m, n, device="cuda", dtype=dtype)
        self.inbox = torch.zeros(INBOX_BYTES, device="cuda", dtype=torch.uint8)
        self.counter = torch.zeros(1, device="cuda", dtype=torch.int64)
        self.watch = torch.zeros(2, dtype=torch.int64, pin_memory=True)  # no bound
        place = (self.inbox.data_ptr(),), self.counter.data_ptr()
        self.box = Box(*place, 0, self.watch.data_ptr(), self.inbox.device.index)

    def run(self, **options) -> torch.Tensor:
        """The product, as the kernel that takes it has it; of a group of one."""
        from maco_lib.kernels.sum_norm import sum_norm

        decode(self.x, self.weight, self.bias, self.box, **options)
        return sum_norm(None, self.zeros, self.zeros[0], EPS, self.box)[1]

    def error(self, product: torch.Tensor) -> float:
        bias = None if self.bias is None else self.bias.double()
        exact = torch.nn.functional.linear(self.x.double(), self.weight.double(), bias)
        return float((product.double() - exact).norm() / exact.norm())


def test_what_there_is_no_room_for_is_not_for_it():
    assert fits(64, 8192, 2) and fits(1, 4, 8)
    assert not fits(MAX_ROWS + 1, 8192, 2), "rows"
    assert not fits(64, 8192, 8), "lines"
    assert not fits(16, 4098, 2), "half a line"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_as_right_as_cublas_and_the_same_every_time(dtype):
    for size, bias in itertools.product(SIZES, (False, True)):
        example = Example(*size, dtype, bias)
        assert readable(example.x, example.weight)
        product = example.run()
        reference = torch.nn.functional.linear(example.x, example.weight, example.bias)
        assert example.error(product) <= 1.01 * example.error(reference) + 1e-6, (size, bias)
        assert all(torch.equal(example.run(), product) for _ in range(20)), (size, bias)


@pytest.mark.gpu
def test_it_is_right_in_a_graph_where_launches_follow_each_other_at_once():
    """An early read of a stage, a late arrival at a CTA that has gone: they show when there is no pause between."""
    examples = [Example(*size, torch.bfloat16) for size in SIZES]
    wanted = [example.run() for example in examples]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = [example.run() for example in examples * 5]
    for _ in range(20):
        for result in results:
            result.zero_()
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(results, wanted * 5, strict=True))
    examples[0].x.neg_()
    graph.replay()
    assert torch.equal(results[0], examples[0].run())


@pytest.mark.gpu
def test_what_tma_cannot_read_is_not_for_it():
    good = Example(4, 64, 64, torch.bfloat16)
    odd = torch.zeros(64 * 73, device="cuda", dtype=torch.bfloat16)
    assert readable(good.x, good.weight)
    for wrong in (odd.view(64, 73)[:, :64], odd[1 : 1 + 64 * 64].view(64, 64), good.weight.t()):
        assert not readable(good.x, wrong)
