"""Sum the ranks' copies of a range of elements and store the sum wherever it is wanted: the SM part of our all-reduces.

A persistent kernel of as few CTAs as it is given: the rest of the GPU is left to the computation beside it. Each CTA
has one tile of every source in flight, in 16-byte accesses, and adds in float32 whatever the type, so the result is
rounded once. One CTA moves about 45 GB/s each way on a Hopper GPU; 8 of them fill NVLink.

Ranks meet CTA by CTA (`meet`): CTA c waits for CTA c of the other ranks only, never for a whole grid, so the kernel
makes progress however few of its CTAs the GPU has room for. Flags only grow, so replays of a CUDA graph need no reset.
"""

import torch
import triton
import triton.language as tl

MAX_CTAS = 256
MAX_RANKS = 8
NUM_FLAGS = 2 * MAX_CTAS * MAX_RANKS
# All sources of a tile together, per CTA: what 1024 threads can hold in flight in their registers.
TILE_BYTES = 2**17
MIN_TILE_BYTES = 2**13
MAX_WARPS = 32
BYTES_PER_WARP = 32 * 16
# Elements: ranges begin and end at multiples of it, so that every access is 16 bytes wide.
GRANULE = 16

CTAS, RANKS = tl.constexpr(MAX_CTAS), tl.constexpr(MAX_RANKS)


@triton.jit
def meet(flags, rank: tl.constexpr, num_ranks: tl.constexpr, phase: tl.constexpr, epoch):
    """This CTA of every rank has come here before any goes on; what they wrote before is visible after."""
    tl.debug_barrier()
    slot = (phase * CTAS + tl.program_id(0)) * RANKS
    for step in tl.static_range(1, num_ranks):
        theirs = tl.load(flags + (rank + step) % num_ranks).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(theirs + slot + rank, epoch, sem="release", scope="sys")
    ours = tl.load(flags + rank).to(tl.pointer_type(tl.int32))
    for step in tl.static_range(1, num_ranks):
        flag = ours + slot + (rank + step) % num_ranks
        while tl.atomic_add(flag, 0, sem="acquire", scope="sys") < epoch:
            pass
    tl.debug_barrier()


@triton.jit
def sum_shares_kernel(
    sources, targets, flags, epochs, begin, end,
    rank: tl.constexpr, num_ranks: tl.constexpr, num_sources: tl.constexpr, num_targets: tl.constexpr,
    enter: tl.constexpr, leave: tl.constexpr, element: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    epoch = tl.load(epochs + tl.program_id(0)) + 1
    if enter:
        meet(flags, rank, num_ranks, 0, epoch)
    for start in range(begin + tl.program_id(0) * block, end, tl.num_programs(0) * block):
        offsets = start + tl.arange(0, block)
        inside = offsets < end
        total = tl.zeros((block,), tl.float32)
        for number in tl.static_range(num_sources):
            source = tl.multiple_of(tl.load(sources + number).to(tl.pointer_type(element)), 16)
            total += tl.load(source + offsets, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        for number in tl.static_range(num_targets):
            target = tl.multiple_of(tl.load(targets + number).to(tl.pointer_type(element)), 16)
            tl.store(target + offsets, total.to(element), mask=inside)
    if leave:
        meet(flags, rank, num_ranks, 1, epoch)
    tl.debug_barrier()
    tl.store(epochs + tl.program_id(0), epoch)


ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def tile_elements(num_elements: int, num_ctas: int, num_sources: int, itemsize: int) -> int:
    """Elements of a tile: as many as fit in flight, fewer where that would leave CTAs without work."""
    most = TILE_BYTES // num_sources // itemsize
    least = MIN_TILE_BYTES // itemsize
    return max(least, min(1 << (most.bit_length() - 1), triton.next_power_of_2(-(-num_elements // num_ctas))))


def sum_shares(
    sources: torch.Tensor,
    targets: torch.Tensor,
    begin: int,
    end: int,
    dtype: torch.dtype,
    *,
    flags: torch.Tensor,
    epochs: torch.Tensor,
    rank: int,
    num_ranks: int,
    num_ctas: int,
    enter: bool,
    leave: bool,
) -> None:
    """Store the sum of elements [begin, end) of every source at the same place of every target, on the current stream.

    sources, targets: int64, addresses of arrays of `dtype` (bf16, fp16 or fp32), 16-byte aligned. begin, end: multiples
    of `GRANULE`. flags: int64, each rank's `NUM_FLAGS` int32 flags; epochs: int32, `MAX_CTAS`, this rank's own.
    enter, leave: meet the other ranks before the first access and after the last; then collective.
    """
    block = tile_elements(end - begin, num_ctas, len(sources), dtype.itemsize)
    num_warps = min(MAX_WARPS, block * dtype.itemsize // BYTES_PER_WARP)
    sum_shares_kernel[(num_ctas,)](
        sources, targets, flags, epochs, begin, end,
        rank=rank, num_ranks=num_ranks, num_sources=len(sources), num_targets=len(targets),
        enter=enter, leave=leave, element=ELEMENTS[dtype], block=block, num_warps=num_warps,
    )  # fmt: skip
