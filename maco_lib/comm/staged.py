"""All-reduce that a few SMs and the copy engine share, for the side of a computation that fills the GPU.

A kernel of a few CTAs sums every share in place (`kernels.add_share`; float32, whose denormals an addition in memory
would flush, by `kernels.sum_shares`); the copy engine then gives the sums to all, and no SM is held. A persistent
matmul (cuBLAS's on Hopper) gives every CTA its tiles in advance: one of several rounds of tiles (n = 4096 and more)
loses next to nothing while 8 SMs come to it late, but not later than about two fifths of its time, and a round
otherwise (table `sm_sharing`). Half of the all-reduce on SMs, at the beginning, fits into that with 8 CTAs; where 12
are needed, cuBLAS is told to leave them (`Plan.leaves`).

Wins beside a computation that fills the GPU and takes longer than the all-reduce; alone, its copies cost some µs each.
Sums are rounded at every addition, P - 1 times, as NCCL's are.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from maco_lib import state as states
from maco_lib.comm.peers import Peers, SharedSum
from maco_lib.comm.symmetric import Region


@dataclass(frozen=True)
class Staged(SharedSum):
    def reduce(self, region: Region, source: torch.Tensor, result: torch.Tensor, group: dist.ProcessGroup) -> None:
        from maco_lib.kernels.add_share import add_share
        from maco_lib.kernels.sum_shares import sum_shares

        shared, dtype = states.of(group, source.device).get(Peers), source.dtype
        begin, end = shared.share(source.numel(), source.itemsize, shared.rank)
        buffers = shared.everywhere(region, source)
        part, how = (begin, end, dtype, shared.at), {"num_ctas": self.num_ctas}
        if dtype == torch.float32:
            launch = sum_shares(buffers, buffers[-1:], *part, enter=True, leave=False, **how)
        else:
            launch = add_share(buffers[:-1], buffers[-1], *part, **how)
        shared.issue(launch, self.size(source))
        shared.give(region, source[begin:end])


BACKENDS = (Staged("maco_staged_8", num_ctas=8), Staged("maco_staged_12", num_ctas=12))
PLACE = 4
