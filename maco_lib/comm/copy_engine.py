"""All-reduce whose data the copy engine carries: SMs only add, after all has arrived.

Takes SMs for the shortest time, but every copy costs some µs to start: wins at large sizes beside a computation that
cannot spare any, if at all. Needs one more buffer of the tensor's size.
"""

import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist

from maco_lib.comm.peers import SharedSum, peers
from maco_lib.comm.symmetric import GRANULE_BYTES, Region, memory


@dataclass(frozen=True)
class CopyEngine(SharedSum):
    def reduce(self, region: Region, source: torch.Tensor, result: torch.Tensor, group: dist.ProcessGroup) -> None:
        shared = peers(group, source.device)
        begin, end = shared.share(source.numel(), source.itemsize, shared.rank)
        length = shared.share(source.numel(), source.itemsize, 0)[1]
        inbox = scratch(group, source.device, source.nbytes + shared.num_ranks * GRANULE_BYTES)
        slots = inbox.base[: shared.num_ranks * length * source.itemsize].view(source.dtype).view(-1, length)
        for rank in shared.others():
            first, last = shared.share(source.numel(), source.itemsize, rank)
            inbox.peer(rank, slots[shared.rank, : last - first]).copy_(source[first:last])
        # The kernel takes one offset for all its arrays: each slot as if it began where the tensor does.
        arrived = [slots[rank].data_ptr() - begin * source.itemsize for rank in shared.others()]
        sources, own = shared.addresses(*arrived, source.data_ptr()), shared.addresses(source.data_ptr())
        shared.sum(sources, own, begin, end, source.dtype, self.num_ctas, enter=True, leave=False)
        for rank in shared.others():
            region.peer(rank, source)[begin:end].copy_(source[begin:end])
        shared.sum(own, own, end, end, source.dtype, 1, enter=False, leave=True)


_SCRATCH: "weakref.WeakKeyDictionary[dist.ProcessGroup, Region]" = weakref.WeakKeyDictionary()


def scratch(group: dist.ProcessGroup, device: torch.device, num_bytes: int) -> Region:
    """Where peers leave their copies of this rank's share; collective when it has to grow."""
    if group not in _SCRATCH or _SCRATCH[group].base.nbytes < num_bytes:
        _SCRATCH[group] = memory(group, device).allocate(1 << (num_bytes - 1).bit_length())
    return _SCRATCH[group]
