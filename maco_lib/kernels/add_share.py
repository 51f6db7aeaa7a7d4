"""Add the peers' copies of a range of elements to ours, in memory: a reduce-scatter that moves the fewest bytes per SM.

The sum is done where our copy lies (16-byte reductions in the L2 cache), so an SM only reads what comes from a peer and
passes it on: with 2 ranks two transfers of each byte where `sum_shares` has three, which counts when a few SMs have to
keep up with NVLink. Rounds at every addition, P - 1 times, as NCCL's ring does. Each element is added to by one thread,
in one order: deterministic.

For 16-bit types: of float32 the hardware's additions in memory (red.add.f32 of PTX) flush denormals to zero.
"""

import torch
import triton
import triton.language as tl

from maco_lib.kernels.launch import Launch, of_triton
from maco_lib.kernels.meet import Flags, array, meet
from maco_lib.kernels.patience import code
from maco_lib.kernels.sum_shares import ELEMENTS

# What a CTA has in flight: the peers are about 2 µs away.
TILE_BYTES = 2**17
NUM_WARPS = 32
DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def add_share_kernel(
    sources, target, flags, epochs, watch, begin, end,
    rank: tl.constexpr, num_ranks: tl.constexpr, element: tl.constexpr, block: tl.constexpr, who: tl.constexpr,
):  # fmt: skip
    own_epoch = array(epochs, tl.int32) + tl.program_id(0)
    epoch = tl.load(own_epoch) + 1
    meet(flags, rank, num_ranks, 0, epoch, watch, who)
    sums = array(target, element)
    for number in tl.static_range(num_ranks - 1):
        source = array(sources[number], element)
        for start in range(begin + tl.program_id(0) * block, end, tl.num_programs(0) * block):
            offsets = start + tl.arange(0, block)
            inside = offsets < end
            values = tl.load(source + offsets, mask=inside, cache_modifier=".cg")
            tl.atomic_add(sums + offsets, values, mask=inside, sem="relaxed", scope="gpu")
    tl.debug_barrier()
    tl.store(own_epoch, epoch)


def add_share(
    sources: tuple[int, ...], target: int, begin: int, end: int, dtype: torch.dtype, at: Flags, *, num_ctas: int
) -> Launch:
    """The launch that adds elements [begin, end) of every source to those of target, once every rank has come here.

    Arguments as in `sum_shares`, of bf16 or fp16; target: the address of this rank's own copy. Raises ValueError on
    another type.
    """
    if dtype not in DTYPES:
        raise ValueError(f"add_share of {dtype}; the types are {', '.join(map(str, DTYPES))}")
    key = sources, target, begin, end, dtype, num_ctas
    launch = at.launches.get(key)
    if launch is None:
        launch, _ = of_triton(
            add_share_kernel, num_ctas, (sources, target, at.flags, at.epochs, at.watch, begin, end), at.device_index,
            rank=at.rank, num_ranks=len(at.flags), element=ELEMENTS[dtype], block=TILE_BYTES // dtype.itemsize,
            who=code("add_share"), num_warps=NUM_WARPS,
        )  # fmt: skip
        at.launches.keep(key, launch)
    return launch
