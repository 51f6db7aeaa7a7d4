"""Our two-shot all-reduces on a set number of CTAs.

pull    a kernel reads all copies of its share and writes the sum to all ranks: 8 CTAs nearly fill NVLink, where NCCL
        takes 16 to 32. Wins where SMs are scarce.
push    ranks write their parts of a share to its owner, who writes the sum to all: only writes, which NVLink carries
        faster than reads, and one wait fewer; needs one more buffer of the tensor's size. Wins from about 4 MiB up:
        with 128 CTAs alone, with 64 beside a computation that leaves that many SMs.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from maco_lib.comm.peers import SharedSum, peers
from maco_lib.comm.symmetric import Region


@dataclass(frozen=True)
class PullTwoShot(SharedSum):
    def reduce(self, region: Region, source: torch.Tensor, result: torch.Tensor, group: dist.ProcessGroup) -> None:
        shared = peers(group, source.device)
        begin, end = shared.share(source.numel(), source.itemsize, shared.rank)
        buffers = shared.everywhere(region, source)
        shared.sum(buffers, buffers, begin, end, source.dtype, num_ctas=self.num_ctas, enter=True, leave=True)


@dataclass(frozen=True)
class PushTwoShot(SharedSum):
    def reduce(self, region: Region, source: torch.Tensor, result: torch.Tensor, group: dist.ProcessGroup) -> None:
        from maco_lib.kernels.push_two_shot import push_two_shot

        shared = peers(group, source.device)
        length = shared.share_length(source.numel(), source.itemsize)
        inbox = shared.inboxes(shared.num_ranks * length * source.itemsize)
        push_two_shot(
            shared.everywhere(region, source), shared.rotated(inbox.addresses), source.numel(), length, source.dtype,
            flags=shared.flags, epochs=shared.epochs, rank=shared.rank, num_ctas=self.num_ctas,
        )  # fmt: skip
