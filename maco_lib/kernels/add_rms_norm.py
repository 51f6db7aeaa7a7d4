"""Residual add and RMSNorm in one kernel, out of place: what follows an all-reduce that is not fused with them.

One CTA a row. Reads and writes each element once, so nothing that leaves the all-reduce as it is can be faster.
"""

import torch
import triton
import triton.language as tl

from maco_lib.kernels.launch import Launches, of_triton
from maco_lib.kernels.sum_shares import ELEMENTS, array

ELEMENTS_PER_WARP = 512


@triton.jit
def add_rms_norm_kernel(x, residual, weight, normed, total, n, eps, element: tl.constexpr, block: tl.constexpr):
    columns = tl.arange(0, block)
    inside = columns < n
    offsets = tl.program_id(0).to(tl.int64) * n + columns
    value = tl.load(array(x, element) + offsets, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(array(residual, element) + offsets, mask=inside, other=0.0).to(tl.float32)
    value = value.to(element)
    tl.store(array(total, element) + offsets, value, mask=inside)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / n + eps)
    scale_by_column = tl.load(array(weight, element) + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(array(normed, element) + offsets, (value * scale * scale_by_column).to(element), mask=inside)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, launches: Launches
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm(x + residual) * weight, x + residual) for contiguous x and residual (m, n) and weight (n,); new tensors.

    In float32, of the sum as it is rounded to x's type, bf16, fp16 or fp32. All begin at multiples of 16. launches:
    where what is prepared is kept, for one device.
    """
    (m, n), dtype = x.shape, x.dtype
    normed, total = torch.empty_like(x), torch.empty_like(x)
    addresses = x.data_ptr(), residual.data_ptr(), weight.data_ptr(), normed.data_ptr(), total.data_ptr()
    key = "add_rms_norm", m, n, dtype, eps
    prepared = launches.get(key)
    if prepared is None:
        block = triton.next_power_of_2(n)
        launch, values = of_triton(
            add_rms_norm_kernel, m, (*addresses, n, eps), x.device.index, element=ELEMENTS[dtype], block=block,
            num_warps=min(16, max(4, block // ELEMENTS_PER_WARP)),
        )  # fmt: skip
        prepared = launches.keep(key, (launch, values[:5]))
    launch, places = prepared
    for place, address in zip(places, addresses, strict=True):
        place.value = address
    launch()
    return normed, total
