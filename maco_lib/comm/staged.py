"""All-reduce in two parts, so that SMs are held only at the beginning and at the end of a computation beside it.

A persistent matmul loses nothing while a few of its CTAs start late, and nothing while it drains; in between it fills
the GPU. The first kernel does the head of every share, the second the rest, as soon as SMs are free again.

    head two-shot       both kernels are two-shots; NVLink idles between them
    head copied         the first kernel only sums; the copy engine gives the sums to the peers, without an SM
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from maco_lib.comm.peers import SharedSum, peers
from maco_lib.comm.symmetric import GRANULE_BYTES, Region


@dataclass(frozen=True)
class Staged(SharedSum):
    """`head`: the part of each share done first, `copied` by the copy engine; `num_tail_ctas`: of the second kernel."""

    head: float = 0.6
    copied: bool = False
    num_tail_ctas: int = 16

    def reduce(self, region: Region, source: torch.Tensor, result: torch.Tensor, group: dist.ProcessGroup) -> None:
        shared = peers(group, source.device)
        begin, end = shared.share(source.numel(), source.itemsize, shared.rank)
        granule = GRANULE_BYTES // source.itemsize
        middle = begin + int(self.head * (end - begin)) // granule * granule
        buffers = shared.everywhere(region, source)
        first = (source.data_ptr(),) if self.copied else buffers
        dtype = source.dtype
        self.sum(shared, buffers, first, begin, middle, dtype, num_ctas=self.num_ctas, enter=True, leave=False)
        if self.copied and middle > begin:
            for rank in shared.others:
                region.peer(rank, source)[begin:middle].copy_(source[begin:middle])
        # Its leave tells the peers that what went before has arrived, too.
        self.sum(shared, buffers, buffers, middle, end, dtype, num_ctas=self.num_tail_ctas, enter=False, leave=True)
