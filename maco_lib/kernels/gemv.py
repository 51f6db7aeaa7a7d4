"""A matmul of one row, what a layer does when a single sequence is decoded: as long as reading the weight takes.

Each CTA multiplies so many of the weight's rows, element by element, and sums at the end; there are several times as
many CTAs as SMs, and all are read at once. No tensor cores: one row would leave all but a few of their lanes idle.
"""

import torch
import triton
import triton.language as tl

ROWS, COLUMNS, NUM_WARPS, NUM_STAGES = 16, 512, 4, 4
# Fewer weight rows leave SMs without any to read.
MIN_ROWS = 2048
# Elements: 16 bytes, which a thread loads at once, twice.
MULTIPLE = 16


@triton.jit
def gemv_kernel(
    x, weight, bias, product, num_rows, k, pitch,
    rows: tl.constexpr, columns: tl.constexpr, num_stages: tl.constexpr, biased: tl.constexpr,
):  # fmt: skip
    numbers = tl.program_id(0) * rows + tl.arange(0, rows)
    inside = numbers < num_rows
    steps = tl.arange(0, columns)
    # Beyond the last row, the last is read again, which needs no mask.
    places = weight + tl.minimum(numbers, num_rows - 1).to(tl.int64)[:, None] * pitch + steps[None, :]
    products = tl.zeros([rows, columns], tl.float32)
    for begin in tl.range(0, k, columns, num_stages=num_stages):
        there = steps < k - begin
        values = tl.load(x + begin + steps, mask=there, other=0.0).to(tl.float32)
        weights = tl.load(places + begin, mask=there[None, :], other=0.0).to(tl.float32)
        products += weights * values[None, :]
    total = tl.sum(products, 1)
    if biased:
        total += tl.load(bias + numbers, mask=inside, other=0.0).to(tl.float32)
    tl.store(product + numbers, total.to(product.dtype.element_ty), mask=inside)


def for_gemv(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `gemv` takes x @ weight.T and reads the weight at full speed."""
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and len(x) == 1
        and len(weight) >= MIN_ROWS
        and x.shape[1] % MULTIPLE == 0
        and x.stride(1) == weight.stride(1) == 1
        and weight.stride(0) % MULTIPLE == 0
        and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    )


def gemv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias, (1, N), new: summed in float32 in one order, rounded once.

    x: (1, K), weight: (N, K), as `for_gemv` says; bias: (N,), of their type.
    """
    num_rows, k = weight.shape
    product = x.new_empty(1, num_rows)
    gemv_kernel[(triton.cdiv(num_rows, ROWS),)](
        x, weight, product if bias is None else bias, product, num_rows, k, weight.stride(0),
        rows=ROWS, columns=COLUMNS, num_stages=NUM_STAGES, biased=bias is not None, num_warps=NUM_WARPS,
    )  # fmt: skip
    return product
