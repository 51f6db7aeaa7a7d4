"""Sum the ranks' copies of a range of elements and store the sum wherever it is wanted: the SM part of our all-reduces.

A persistent kernel of as few CTAs as it is given: the rest of the GPU is left to the computation beside it. Each CTA
has one tile of every source in flight, in 16-byte accesses, and adds in float32 whatever the type, so the result is
rounded once. One CTA moves about 45 GB/s each way on a Hopper GPU; 8 of them nearly fill NVLink.
"""

import torch
import triton
import triton.language as tl

from maco_lib.kernels.launch import Launch, of_triton
from maco_lib.kernels.meet import Flags, array, meet
from maco_lib.kernels.patience import code

# All sources of a tile together, per CTA: what 1024 threads can hold in flight in their registers.
TILE_BYTES = 2**17
MIN_TILE_BYTES = 2**13
MAX_WARPS = 32
BYTES_PER_WARP = 32 * 16

ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def sum_shares_kernel(
    sources, targets, flags, epochs, watch, begin, end,
    rank: tl.constexpr, num_ranks: tl.constexpr, num_sources: tl.constexpr, num_targets: tl.constexpr,
    enter: tl.constexpr, leave: tl.constexpr, element: tl.constexpr, block: tl.constexpr, who: tl.constexpr,
):  # fmt: skip
    own_epoch = array(epochs, tl.int32) + tl.program_id(0)
    epoch = tl.load(own_epoch) + 1
    if enter:
        meet(flags, rank, num_ranks, 0, epoch, watch, who)
    for start in range(begin + tl.program_id(0) * block, end, tl.num_programs(0) * block):
        offsets = start + tl.arange(0, block)
        inside = offsets < end
        loaded = ()
        for number in tl.static_range(num_sources):
            loaded = loaded + (tl.load(array(sources[number], element) + offsets, mask=inside, cache_modifier=".cg"),)
        total = loaded[0].to(tl.float32)
        for number in tl.static_range(1, num_sources):
            total += loaded[number].to(tl.float32)
        for number in tl.static_range(num_targets):
            tl.store(array(targets[number], element) + offsets, total.to(element), mask=inside)
    if leave:
        meet(flags, rank, num_ranks, 1, epoch, watch, who)
    tl.debug_barrier()
    tl.store(own_epoch, epoch)


def tile_elements(num_elements: int, num_ctas: int, num_sources: int, itemsize: int) -> int:
    """Elements of a tile: as many as fit in flight, fewer where that would leave CTAs without work."""
    most = TILE_BYTES // num_sources // itemsize
    least = MIN_TILE_BYTES // itemsize
    return max(least, min(1 << (most.bit_length() - 1), triton.next_power_of_2(-(-num_elements // num_ctas))))


def num_warps(block: int, itemsize: int) -> int:
    """Warps of a CTA whose threads take 16 bytes of a tile at a time."""
    return min(MAX_WARPS, block * itemsize // BYTES_PER_WARP)


def sum_shares(
    sources: tuple[int, ...],
    targets: tuple[int, ...],
    begin: int,
    end: int,
    dtype: torch.dtype,
    at: Flags,
    *,
    num_ctas: int,
    enter: bool,
    leave: bool,
) -> Launch:
    """The launch that stores the sum of elements [begin, end) of every source at the same place of every target.

    sources, targets: addresses of arrays of `dtype` (bf16, fp16 or fp32), multiples of 16. begin, end: multiples of 16.
    enter, leave: meet the other ranks before the first access and after the last; then collective.
    """
    key = sources, targets, begin, end, dtype, num_ctas, enter, leave
    launch = at.launches.get(key)
    if launch is None:
        block = tile_elements(end - begin, num_ctas, len(sources), dtype.itemsize)
        launch, _ = of_triton(
            sum_shares_kernel, num_ctas,
            (sources, targets, at.flags, at.epochs, at.watch, begin, end), at.device_index,
            rank=at.rank, num_ranks=len(at.flags), num_sources=len(sources), num_targets=len(targets),
            enter=enter, leave=leave, element=ELEMENTS[dtype], block=block, who=code("sum_shares"),
            num_warps=num_warps(block, dtype.itemsize),
        )  # fmt: skip
        at.launches.keep(key, launch)
    return launch
