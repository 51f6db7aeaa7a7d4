"""All-reduce, residual addition and RMSNorm in one kernel, a row of N elements per CTA: what follows a decode matmul.

one-shot    every rank sends its product to all others, and does the rest of the work on every row: one way
two-shot    every rank owns each Pth row, adds it up and sends the sum with the residual to all: two ways over the link,
            P / 2 times fewer bytes; wins above 2 ranks where the bytes count
flagged     either, in plain data with flags instead of lines (`kernels.lines`): half the bytes, a longer wait per way

Adds in float32 in the order of the ranks; the sum with the residual is rounded once, and what is rounded is normalised.
Products are only read by their own rank, so they may lie anywhere. One-shot in lines, the matmul itself can send them
(`kernels.decode`): then there is only to take and to add.
"""

import torch
import triton
import triton.language as tl

from maco_lib.kernels import lines
from maco_lib.kernels.lines import LINE_DATA, PACK, add, begin, pack, put, raise_flag, sum_of_ranks, take, unpack, words
from maco_lib.kernels.sum_shares import ELEMENTS

MAX_ROWS = 256
# More than this would not stay in a CTA's registers.
MAX_ROW_BYTES = 2**17
MAX_WARPS = 32


@triton.jit
def normalise(data, weights, normed, offsets, inside, eps, num_lines: tl.constexpr, element: tl.constexpr):
    """Store the RMSNorm of a row (packed) times the weights (unpacked) at `normed`."""
    values = unpack(data, element)
    squares = values[0] * values[0]
    for number in tl.static_range(1, 64 // element.primitive_bitwidth):
        squares += values[number] * values[number]
    scale = tl.rsqrt(tl.sum(squares) / (num_lines * (64 // element.primitive_bitwidth)) + eps)
    scaled = ()
    for number in tl.static_range(64 // element.primitive_bitwidth):
        scaled = scaled + (values[number] * scale * weights[number],)
    tl.store(normed + offsets, pack(scaled, element), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def one_shot_norm_kernel(
    product, residual, weight, normed, total, inboxes, counter, num_rows, eps,
    num_lines: tl.constexpr, block: tl.constexpr, rank: tl.constexpr, num_ranks: tl.constexpr,
    element: tl.constexpr, flagged: tl.constexpr, sent: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    begin_of_row = row * num_lines
    offsets = tl.arange(0, block)
    inside = offsets < num_lines
    epoch, half = begin(counter)
    if not sent:
        own = tl.load(words(product) + begin_of_row + offsets, mask=inside, other=0)
        for step in tl.static_range(num_ranks - 1):
            slot = (num_ranks - 2 - step) * num_rows + row
            put(inboxes[step] + half, slot, num_lines, offsets, own, epoch, inside, flagged)
        if flagged:
            tl.debug_barrier()
        for step in tl.static_range(num_ranks - 1):
            raise_flag(inboxes[step] + half, (num_ranks - 2 - step) * num_rows + row, epoch, flagged)
    old = tl.load(words(residual) + begin_of_row + offsets, mask=inside, other=0)
    weights = unpack(tl.load(words(weight) + offsets, mask=inside, other=0), element)
    own_half = inboxes[num_ranks - 1] + half
    if sent:
        own = take(own_half, (num_ranks - 1) * num_rows + row, num_lines, offsets, epoch, inside, flagged)
    sums = sum_of_ranks(
        own, own_half, row, num_rows, num_lines, offsets, epoch, inside, rank, num_ranks, element, flagged
    )
    data = pack(add(sums, unpack(old, element), element), element)
    tl.store(words(total) + begin_of_row + offsets, data, mask=inside)
    normalise(data, weights, words(normed) + begin_of_row, offsets, inside, eps, num_lines, element)
    if sent:
        # What comes after this kernel comes after the one before, too.
        tl.extra.cuda.gdc_wait()


@triton.jit(do_not_specialize=["num_rows"])
def two_shot_norm_kernel(
    product, residual, weight, normed, total, inboxes, counter, num_rows, eps,
    num_lines: tl.constexpr, block: tl.constexpr, rank: tl.constexpr, num_ranks: tl.constexpr,
    element: tl.constexpr, flagged: tl.constexpr,
):  # fmt: skip
    first, num_ctas = tl.program_id(0) * num_ranks, tl.num_programs(0)
    offsets = tl.arange(0, block)
    inside = offsets < num_lines
    products = words(product) + offsets
    # Rows beyond the last are neither sent nor awaited; the first of the CTA's is there, so all ranks still meet.
    mine = first + rank
    ours = inside & (mine < num_rows)
    epoch, half = begin(counter)
    own_half = inboxes[num_ranks - 1] + half
    for step in tl.static_range(num_ranks - 1):
        row = first + (rank + 1 + step) % num_ranks
        theirs = inside & (row < num_rows)
        data = tl.load(products + row * num_lines, mask=theirs, other=0)
        slot = (num_ranks - 2 - step) * num_ctas + tl.program_id(0)
        put(inboxes[step] + half, slot, num_lines, offsets, data, epoch, theirs, flagged)
    if flagged:
        tl.debug_barrier()
    for step in tl.static_range(num_ranks - 1):
        raise_flag(inboxes[step] + half, (num_ranks - 2 - step) * num_ctas + tl.program_id(0), epoch, flagged)
    own = tl.load(products + mine * num_lines, mask=ours, other=0)
    old = tl.load(words(residual) + mine * num_lines + offsets, mask=ours, other=0)
    weights = unpack(tl.load(words(weight) + offsets, mask=inside, other=0), element)
    sums = sum_of_ranks(
        own, own_half, tl.program_id(0), num_ctas, num_lines, offsets, epoch, ours, rank, num_ranks, element, flagged
    )
    data = pack(add(sums, unpack(old, element), element), element)
    for step in tl.static_range(num_ranks - 1):
        slot = (2 * num_ranks - 3 - step) * num_ctas + tl.program_id(0)
        put(inboxes[step] + half, slot, num_lines, offsets, data, epoch, ours, flagged)
    if flagged:
        tl.debug_barrier()
    for step in tl.static_range(num_ranks - 1):
        raise_flag(inboxes[step] + half, (2 * num_ranks - 3 - step) * num_ctas + tl.program_id(0), epoch, flagged)
    for step in tl.static_range(num_ranks):
        row = first + (rank + step) % num_ranks
        there = inside & (row < num_rows)
        if step > 0:
            slot = (num_ranks - 2 + step) * num_ctas + tl.program_id(0)
            data = take(own_half, slot, num_lines, offsets, epoch, there, flagged)
        tl.store(words(total) + row * num_lines + offsets, data, mask=there)
        place = words(normed) + row * num_lines
        normalise(data, weights, place, offsets, there, eps, num_lines, element)


def fits(num_rows: int, row_bytes: int, num_ranks: int, two_shot: bool, flagged: bool) -> bool:
    """Whether the kernel of this kind has room for it: rows, registers and inbox."""
    slots = 2 * (num_ranks - 1) * -(-num_rows // num_ranks) if two_shot else (num_ranks - 1) * num_rows
    room = lines.PLAIN_BYTES // row_bytes if flagged else lines.LINE_BYTES // (2 * row_bytes)
    return num_rows <= MAX_ROWS and row_bytes <= MAX_ROW_BYTES and slots <= min(room, lines.NUM_FLAGS)


def sum_norm(
    product: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    inboxes: tuple[int, ...],
    counter: torch.Tensor,
    rank: int,
    two_shot: bool = False,
    flagged: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, total), new: total = residual + the ranks' products, normed = RMSNorm(total) * weight. Collective.

    product, residual: (M, N); weight: (N,); bf16, fp16 or fp32, contiguous, beginning at multiples of 16, a row being a
    whole number of 8 bytes; of a kind and size that `fits`. inboxes, counter: as in `one_shot`. product: None where the
    kernel in front, `decode`, puts it into all inboxes; this one is then launched before that one has ended
    (programmatic dependent launch), and takes it from there as it arrives.
    """
    sent = product is None
    num_rows, row_bytes = len(residual), residual.nbytes // len(residual)
    num_lines = row_bytes // LINE_DATA
    block = max(32 * PACK, triton.next_power_of_2(num_lines))
    num_ctas = triton.cdiv(num_rows, len(inboxes)) if two_shot else num_rows
    # Of more CTAs than SMs two are to share one, so that the last rows need not wait for the first ones' peers.
    num_sms = torch.cuda.get_device_properties(residual.device).multi_processor_count
    max_warps = MAX_WARPS if num_ctas <= num_sms else MAX_WARPS // 2
    normed, total = torch.empty_like(residual), torch.empty_like(residual)
    options = {} if two_shot else {"sent": sent}
    kernel = two_shot_norm_kernel if two_shot else one_shot_norm_kernel
    kernel[(num_ctas,)](
        0 if sent else product.data_ptr(), residual.data_ptr(), weight.data_ptr(), normed.data_ptr(), total.data_ptr(),
        inboxes, counter.data_ptr(), num_rows, eps,
        num_lines=num_lines, block=block, rank=rank, num_ranks=len(inboxes), element=ELEMENTS[residual.dtype],
        flagged=flagged, **options, num_warps=min(max_warps, block // (32 * PACK)),
        launch_pdl=sent,
    )  # fmt: skip
    return normed, total
