"""All-reduce, residual addition and RMSNorm in one kernel, a row of N elements per CTA: what follows a decode matmul.

A product in memory is summed in long lines (`kernels.ll128`), one-shot or two-shot. One that the matmul itself sends
(`kernels.decode`, one-shot in lines of 16 bytes) there is only to take and to add. Adds in float32 in the order of the
ranks; the sum with the residual is rounded once, and what is rounded is normalised.
"""

import torch
import triton
import triton.language as tl

from maco_lib.kernels.inbox import LINE_DATA, Box
from maco_lib.kernels.launch import of_triton
from maco_lib.kernels.lines import PACK, add, begin, pack, sum_of_ranks, take, unpack, words
from maco_lib.kernels.patience import code
from maco_lib.kernels.sum_shares import ELEMENTS

MAX_WARPS = 32


@triton.jit(do_not_specialize=["num_rows"])
def take_norm_kernel(
    residual, weight, normed, total, inboxes, counter, watch, num_rows, eps,
    num_lines: tl.constexpr, block: tl.constexpr, rank: tl.constexpr, num_ranks: tl.constexpr, element: tl.constexpr,
    who: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    begin_of_row = row * num_lines
    offsets = tl.arange(0, block)
    inside = offsets < num_lines
    epoch, half = begin(counter)
    old = tl.load(words(residual) + begin_of_row + offsets, mask=inside, other=0)
    weights = unpack(tl.load(words(weight) + offsets, mask=inside, other=0), element)
    own_half = inboxes[num_ranks - 1] + half
    own = take(own_half, (num_ranks - 1) * num_rows + row, num_lines, offsets, epoch, inside, watch, who + rank)
    sums = sum_of_ranks(
        own, own_half, row, num_rows, num_lines, offsets, epoch, inside, watch, who, rank, num_ranks, element
    )
    data = pack(add(sums, unpack(old, element), element), element)
    tl.store(words(total) + begin_of_row + offsets, data, mask=inside)
    values = unpack(data, element)
    squares = values[0] * values[0]
    for number in tl.static_range(1, 64 // element.primitive_bitwidth):
        squares += values[number] * values[number]
    scale = tl.rsqrt(tl.sum(squares) / (num_lines * (64 // element.primitive_bitwidth)) + eps)
    scaled = ()
    for number in tl.static_range(64 // element.primitive_bitwidth):
        scaled = scaled + (values[number] * scale * weights[number],)
    tl.store(words(normed) + begin_of_row + offsets, pack(scaled, element), mask=inside)
    # What comes after this kernel comes after the one before, too.
    tl.extra.cuda.gdc_wait()


def sum_norm(
    product: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    box: Box,
    *,
    one_shot: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, total), new: total = residual + the ranks' products, normed = RMSNorm(total) * weight. Collective.

    product, residual: (M, N); weight: (N,); bf16, fp16 or fp32, contiguous, beginning at multiples of 16, a row being a
    whole number of 8 bytes; of a size for which the inbox `has_room`. product: None where the kernel in front,
    `decode`, puts it into all inboxes; this one is then launched before that one has ended (programmatic dependent
    launch), and takes it from there as it arrives.
    """
    normed, total = torch.empty_like(residual), torch.empty_like(residual)
    num_rows, dtype = len(residual), residual.dtype
    num_lines = residual.nbytes // num_rows // LINE_DATA
    if product is not None:
        from maco_lib.kernels import ll128

        ll128.launch(product, total, num_lines, one_shot, box, residual, weight, normed, eps)
        return normed, total
    addresses = residual.data_ptr(), weight.data_ptr(), normed.data_ptr(), total.data_ptr()
    key = "take_norm", num_rows, num_lines, dtype, eps
    prepared = box.launches.get(key)
    if prepared is None:
        block = max(32 * PACK, triton.next_power_of_2(num_lines))
        launch, values = of_triton(
            take_norm_kernel, num_rows, (*addresses, box.inboxes, box.counter, box.watch, num_rows, eps),
            box.device_index, num_lines=num_lines, block=block, rank=box.rank, num_ranks=len(box.inboxes),
            element=ELEMENTS[dtype], who=code("take_norm"),
            num_warps=min(MAX_WARPS, block // (32 * PACK)), launch_pdl=True,
        )  # fmt: skip
        prepared = box.launches.keep(key, (launch, values[:4]))
        box.together(("take_norm", num_lines, dtype))
    launch, places = prepared
    for place, address in zip(places, addresses, strict=True):
        place.value = address
    launch()
    return normed, total
