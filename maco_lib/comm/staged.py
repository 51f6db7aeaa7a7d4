"""All-reduce in two parts: a short reduce-scatter that the copy engine finishes, and a two-shot of the rest.

A short kernel sums the first part of every share, the copy engine gives the sums to the peers, and a two-shot does the
rest: SMs are held only at the beginning and at the end, when a persistent matmul does not have all of them at work.
Wins beside a computation that fills the GPU and takes about as long as the all-reduce.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from maco_lib.comm.peers import SharedSum, peers
from maco_lib.comm.symmetric import GRANULE_BYTES, Region


@dataclass(frozen=True)
class MacoStaged(SharedSum):
    """`head`: the part of each share that the copy engine distributes. `num_tail_ctas`: of the second kernel."""

    head: float = 0.67
    num_tail_ctas: int = 16

    def reduce(self, region: Region, source: torch.Tensor, result: torch.Tensor, group: dist.ProcessGroup) -> None:
        shared = peers(group, source.device)
        begin, end = shared.share(source.numel(), source.itemsize, shared.rank)
        granule = GRANULE_BYTES // source.itemsize
        middle = begin + int(self.head * (end - begin)) // granule * granule
        buffers, own = shared.everywhere(region, source), shared.addresses(source.data_ptr())
        shared.sum(buffers, own, begin, middle, source.dtype, self.num_ctas, enter=True, leave=False)
        for rank in shared.others():
            region.peer(rank, source)[begin:middle].copy_(source[begin:middle])
        # Its leave tells the peers that the copies before it have arrived, too.
        shared.sum(buffers, buffers, middle, end, source.dtype, self.num_tail_ctas, enter=False, leave=True)
