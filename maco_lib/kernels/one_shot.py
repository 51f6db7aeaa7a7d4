"""One-shot all-reduce of a few KiB in lines (`kernels.lines`): every rank sends all it has to all others and adds.

One way over the link and no barrier. Moves 2 (P - 1) S bytes: wins below some hundred KiB, the sizes of decoding. Where
the matmul itself sends its product (`kernels.decode`), there is only to take and to add: `take_sum`.
"""

import torch
import triton
import triton.language as tl

from maco_lib.kernels.inbox import LINE_DATA, Box
from maco_lib.kernels.launch import of_triton
from maco_lib.kernels.lines import PACK, add, begin, pack, put, sum_of_ranks, take, unpack, words
from maco_lib.kernels.patience import code
from maco_lib.kernels.sum_shares import ELEMENTS

NUM_WARPS = 8
BLOCK = NUM_WARPS * 32 * PACK


@triton.jit(do_not_specialize=["num_lines"])
def one_shot_kernel(
    buffer, inboxes, counter, watch, num_lines,
    rank: tl.constexpr, num_ranks: tl.constexpr, element: tl.constexpr, block: tl.constexpr, who: tl.constexpr,
):  # fmt: skip
    epoch, half = begin(counter)
    offsets = tl.program_id(0) * block + tl.arange(0, block)
    inside = offsets < num_lines
    own = tl.load(words(buffer) + offsets, mask=inside, other=0)
    for step in tl.static_range(num_ranks - 1):
        put(inboxes[step] + half, num_ranks - 2 - step, num_lines, offsets, own, epoch, inside)
    own_half = inboxes[num_ranks - 1] + half
    total = sum_of_ranks(own, own_half, 0, 1, num_lines, offsets, epoch, inside, watch, who, rank, num_ranks, element)
    tl.store(words(buffer) + offsets, pack(total, element), mask=inside)


@triton.jit(do_not_specialize=["num_lines"])
def take_kernel(
    result, residual, inboxes, counter, watch, num_lines,
    rank: tl.constexpr, num_ranks: tl.constexpr, element: tl.constexpr, block: tl.constexpr,
    has_residual: tl.constexpr, who: tl.constexpr,
):  # fmt: skip
    epoch, half = begin(counter)
    offsets = tl.program_id(0) * block + tl.arange(0, block)
    inside = offsets < num_lines
    if has_residual:
        old = tl.load(words(residual) + offsets, mask=inside, other=0)
    own_half = inboxes[num_ranks - 1] + half
    own = take(own_half, num_ranks - 1, num_lines, offsets, epoch, inside, watch, who + rank)
    total = sum_of_ranks(own, own_half, 0, 1, num_lines, offsets, epoch, inside, watch, who, rank, num_ranks, element)
    if has_residual:
        total = add(total, unpack(old, element), element)
    tl.store(words(result) + offsets, pack(total, element), mask=inside)
    # What comes after this kernel comes after the one before, too.
    tl.extra.cuda.gdc_wait()


def one_shot(tensor: torch.Tensor, box: Box) -> None:
    """Sum a contiguous tensor of every rank in place, on the current stream. Collective.

    tensor: bf16, fp16 or fp32, a whole number of 8 bytes, at a multiple of 16, (P - 1) times as large at most as
    `inbox.LINE_BYTES` / 2, and of at most `inbox.MAX_CTAS` x `BLOCK` lines.
    """
    num_lines, dtype, address = tensor.nbytes // LINE_DATA, tensor.dtype, tensor.data_ptr()
    key = "one_shot", num_lines, dtype
    prepared = box.launches.get(key)
    if prepared is None:
        launch, values = of_triton(
            one_shot_kernel, triton.cdiv(num_lines, BLOCK), (address, box.inboxes, box.counter, box.watch, num_lines),
            box.device_index, rank=box.rank, num_ranks=len(box.inboxes), element=ELEMENTS[dtype], block=BLOCK,
            who=code("one_shot"), num_warps=NUM_WARPS,
        )  # fmt: skip
        prepared = box.launches.keep(key, (launch, values[0]))
        box.together(("one_shot", dtype))
    launch, place = prepared
    place.value = address
    launch()


def take_sum(result: torch.Tensor, residual: torch.Tensor | None, box: Box) -> None:
    """Fill `result` with the sum of what the kernel in front, `decode`, puts into all inboxes, + residual. Collective.

    Launched before that kernel has ended (programmatic dependent launch); takes the product as it arrives. result,
    residual: contiguous, of one type, bf16 or fp16, a whole number of 8 bytes, at a multiple of 16. The rest as in
    `one_shot`.
    """
    num_lines, dtype = result.nbytes // LINE_DATA, result.dtype
    address, old = result.data_ptr(), 0 if residual is None else residual.data_ptr()
    key = "take_sum", num_lines, dtype, residual is None
    prepared = box.launches.get(key)
    if prepared is None:
        launch, values = of_triton(
            take_kernel, triton.cdiv(num_lines, BLOCK),
            (address, old, box.inboxes, box.counter, box.watch, num_lines), box.device_index,
            rank=box.rank, num_ranks=len(box.inboxes), element=ELEMENTS[dtype], block=BLOCK,
            has_residual=residual is not None, who=code("take_sum"), num_warps=NUM_WARPS, launch_pdl=True,
        )  # fmt: skip
        prepared = box.launches.keep(key, (launch, *values[:2]))
        box.together(("take_sum", dtype, residual is None))
    launch, place, old_place = prepared
    place.value, old_place.value = address, old
    launch()
