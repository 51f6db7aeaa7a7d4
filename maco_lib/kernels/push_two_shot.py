"""Two-shot all-reduce that only writes to peers: NVLink carries writes faster than reads, and one wait fewer is needed.

Each CTA copies its part of every peer's share into the peer's inbox, meets its like on the other ranks, adds what
arrived in its own inbox to its own part and writes the sum to all. Adds in float32, in one order: see `sum_shares`.
"""

import torch
import triton
import triton.language as tl

from maco_lib.kernels.launch import Launch, of_triton
from maco_lib.kernels.meet import Flags, array, meet
from maco_lib.kernels.patience import code
from maco_lib.kernels.sum_shares import ELEMENTS, num_warps, tile_elements


@triton.jit
def push_two_shot_kernel(
    buffers, inboxes, flags, epochs, watch, length, numel,
    rank: tl.constexpr, num_ranks: tl.constexpr, element: tl.constexpr, block: tl.constexpr, who: tl.constexpr,
):  # fmt: skip
    own_epoch = array(epochs, tl.int32) + tl.program_id(0)
    epoch = tl.load(own_epoch) + 1
    own = array(buffers[num_ranks - 1], element)
    for step in tl.static_range(num_ranks - 1):
        inbox = array(inboxes[step], element) + rank * length
        first = (rank + 1 + step) % num_ranks * length
        last = tl.minimum(first + length, numel) - first
        for start in range(tl.program_id(0) * block, last, tl.num_programs(0) * block):
            offsets = start + tl.arange(0, block)
            inside = offsets < last
            tl.store(inbox + offsets, tl.load(own + first + offsets, mask=inside), mask=inside)
    meet(flags, rank, num_ranks, 0, epoch, watch, who)
    first = rank * length
    last = tl.minimum(first + length, numel) - first
    for start in range(tl.program_id(0) * block, last, tl.num_programs(0) * block):
        offsets = start + tl.arange(0, block)
        inside = offsets < last
        total = tl.load(own + first + offsets, mask=inside, other=0.0).to(tl.float32)
        inbox = array(inboxes[num_ranks - 1], element)
        for step in tl.static_range(1, num_ranks):
            slot = inbox + (rank + step) % num_ranks * length
            total += tl.load(slot + offsets, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        for step in tl.static_range(num_ranks):
            target = array(buffers[step], element) + first
            tl.store(target + offsets, total.to(element), mask=inside)
    meet(flags, rank, num_ranks, 1, epoch, watch, who)
    tl.debug_barrier()
    tl.store(own_epoch, epoch)


def push_two_shot(
    buffers: tuple[int, ...],
    inboxes: tuple[int, ...],
    numel: int,
    length: int,
    dtype: torch.dtype,
    at: Flags,
    *,
    num_ctas: int,
) -> Launch:
    """The launch that sums `numel` elements of every rank's buffer in place. Collective.

    buffers, inboxes: addresses on each rank, beginning with the next rank, own last, multiples of 16; an inbox holds
    P shares of `length` elements (a multiple of 16).
    """
    key = buffers, inboxes, numel, length, dtype, num_ctas
    launch = at.launches.get(key)
    if launch is None:
        block = tile_elements(length, num_ctas, 2, dtype.itemsize)
        launch, _ = of_triton(
            push_two_shot_kernel, num_ctas,
            (buffers, inboxes, at.flags, at.epochs, at.watch, length, numel), at.device_index,
            rank=at.rank, num_ranks=len(buffers), element=ELEMENTS[dtype], block=block, who=code("push_two_shot"),
            num_warps=num_warps(block, dtype.itemsize),
        )  # fmt: skip
        at.launches.keep(key, launch)
    return launch
