"""Residual add and RMSNorm in one kernel, out of place: what follows an all-reduce that is not fused with them.

One CTA a row. Reads and writes each element once, so nothing that leaves the all-reduce as it is can be faster.
"""

import torch
import triton
import triton.language as tl

ELEMENTS_PER_WARP = 512


@triton.jit
def add_rms_norm_kernel(x, residual, weight, normed, total, n, eps, block: tl.constexpr):
    columns = tl.arange(0, block)
    inside = columns < n
    offsets = tl.program_id(0).to(tl.int64) * n + columns
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    value = value.to(total.dtype.element_ty)
    tl.store(total + offsets, value, mask=inside)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / n + eps)
    scale_by_column = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + offsets, (value * scale * scale_by_column).to(normed.dtype.element_ty), mask=inside)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm(x + residual) * weight, x + residual) for contiguous x and residual (m, n) and weight (n,); new tensors.

    In float32, of the sum as it is rounded to x's type.
    """
    m, n = x.shape
    normed, total = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(n)
    num_warps = min(16, max(4, block // ELEMENTS_PER_WARP))
    add_rms_norm_kernel[(m,)](x, residual, weight, normed, total, n, eps, block=block, num_warps=num_warps)
    return normed, total
