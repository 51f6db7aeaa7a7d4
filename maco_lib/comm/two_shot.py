"""Our two-shot all-reduces on a set number of CTAs.

pull    a kernel reads all copies of its share and writes the sum to all ranks: 8 CTAs nearly fill NVLink, where NCCL
        takes 16 to 32. Wins where SMs are scarce.
push    ranks write their parts of a share to its owner, who writes the sum to all: only writes, which NVLink carries
        faster than reads, and one wait fewer; needs one more buffer of the tensor's size. Wins from about 4 MiB up:
        with 128 CTAs alone, with 64 beside a computation that leaves that many SMs.
"""

from dataclasses import dataclass

import torch

from maco_lib.comm.peers import Peers, SharedSum
from maco_lib.comm.symmetric import Region
from maco_lib.kernels.launch import Launch


@dataclass(frozen=True)
class PullTwoShot(SharedSum):
    def launch(self, region: Region, source: torch.Tensor, result: torch.Tensor, shared: Peers) -> Launch:
        from maco_lib.kernels.sum_shares import sum_shares

        begin, end = shared.share(source.numel(), source.itemsize, shared.rank)
        buffers, how = shared.everywhere(region, source), {"num_ctas": self.num_ctas, "enter": True, "leave": True}
        return sum_shares(buffers, buffers, begin, end, source.dtype, shared.at, **how)


@dataclass(frozen=True)
class PushTwoShot(SharedSum):
    def launch(self, region: Region, source: torch.Tensor, result: torch.Tensor, shared: Peers) -> Launch:
        from maco_lib.kernels.push_two_shot import push_two_shot

        length = shared.share_length(source.numel(), source.itemsize)
        inbox = shared.inboxes(shared.num_ranks * length * source.itemsize)
        buffers, inboxes = shared.everywhere(region, source), shared.rotated(inbox.addresses)
        return push_two_shot(
            buffers, inboxes, source.numel(), length, source.dtype, shared.at, num_ctas=self.num_ctas
        )  # fmt: skip


BACKENDS = (
    PullTwoShot("maco_pull_8", num_ctas=8),
    PushTwoShot("maco_push_64", num_ctas=64),
    PushTwoShot("maco_push_128", num_ctas=128),
)
PLACE = 3
