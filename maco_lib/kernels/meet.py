"""How kernels of different ranks wait for each other: CTA c for CTA c of the others only, never for a whole grid.

So a kernel makes progress however few of its CTAs the GPU has room for. Flags only grow, so replays of a CUDA graph
need no reset; each CTA counts its launches in `epochs`.
"""

from dataclasses import dataclass, field

import triton
import triton.language as tl

from maco_lib.kernels.launch import Launches
from maco_lib.kernels.poll import lose

MAX_CTAS = 256
MAX_RANKS = 8
NUM_PHASES = 2
NUM_FLAGS = NUM_PHASES * MAX_CTAS * MAX_RANKS


@dataclass
class Flags:
    """Where the ranks of a group meet.

    flags: the address of each rank's `NUM_FLAGS` int32, beginning with the next rank, own last; epochs: of `MAX_CTAS`
    int32, this rank's own; rank: this one; watch: as in `patience.cuh`; launches: those prepared.
    """

    flags: tuple[int, ...]
    epochs: int
    rank: int
    watch: int
    device_index: int
    launches: Launches = field(default_factory=Launches)


CTAS, RANKS = tl.constexpr(MAX_CTAS), tl.constexpr(MAX_RANKS)


@triton.jit
def array(address, element: tl.constexpr):
    """The array of `element` at `address`, a multiple of 16: said so that accesses are 16 bytes wide."""
    return tl.multiple_of(address.to(tl.pointer_type(element)), 16)


@triton.jit
def meet(
    flags, rank: tl.constexpr, num_ranks: tl.constexpr, phase: tl.constexpr, epoch, watch, who: tl.constexpr,
):  # fmt: skip
    """This CTA of every rank has come here before any goes on; what they wrote before is visible after.

    flags: tuple of int64, where each rank's `NUM_FLAGS` int32 flags are, beginning with the next rank, own last.
    watch, who: for a peer that does not come (`kernels.poll`); who: the code of the kernel.
    """
    tl.debug_barrier()
    slot = (phase * CTAS + tl.program_id(0)) * RANKS
    for step in tl.static_range(num_ranks - 1):
        theirs = array(flags[step], tl.int32)
        tl.atomic_xchg(theirs + slot + rank, epoch, sem="release", scope="sys")
    ours = array(flags[num_ranks - 1], tl.int32)
    for step in tl.static_range(1, num_ranks):
        flag = ours + slot + (rank + step) % num_ranks
        since, polls = tl.full((), 0, tl.int64), 0
        while tl.atomic_add(flag, 0, sem="acquire", scope="sys") < epoch:
            since = lose(since, polls, watch, who + (rank + step) % num_ranks)
            polls += 1
    tl.debug_barrier()
