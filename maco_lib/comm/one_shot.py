"""Our one-shot all-reduces: every rank gets all of the others' and sums by itself, in the order of the ranks.

lines   for the sizes of decoding: every rank sends all to all others, in lines that need no flag. One launch and one
        way over the link, from anywhere in memory, without a copy. Above `max_bytes` the bytes count, of which it moves
        2 (P - 1) S: from there on it is the push two-shot (`two_shot`).
pull    reads all copies and writes the sum to any memory of its own, so what was computed in symmetric memory needs no
        copy out. With 2 ranks it moves as much as two-shot, with P ranks P / 2 times that.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from maco_lib.comm.mailbox import mailbox
from maco_lib.comm.peers import SharedSum, peers
from maco_lib.comm.symmetric import ALIGNMENT, Region
from maco_lib.comm.two_shot import PushTwoShot


@dataclass(frozen=True)
class OneShotLines(PushTwoShot):
    """`max_bytes`: the largest tensor that goes in lines; num_ctas: for larger ones."""

    num_ctas: int = 128
    max_bytes: int = 2**18

    def reduce(self, region: Region, source: torch.Tensor, result: torch.Tensor, group: dist.ProcessGroup) -> None:
        if source.nbytes <= self.max_bytes:
            self.in_lines(source, group)
        else:
            super().reduce(region, source, result, group)

    def all_reduce(self, tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False) -> None:
        """As its base's, but without a copy of up to `max_bytes` wherever they lie, in whole multiples of 8."""
        self.require("all_reduce", tensor.dtype)
        if tensor.nbytes and self.anywhere(tensor.nbytes) and tensor.data_ptr() % ALIGNMENT == 0:
            self.in_lines(tensor.view(-1), group)
        else:
            super().all_reduce(tensor, group)

    def anywhere(self, num_bytes: int) -> bool:
        """Whether so many bytes are summed where they lie, in whatever memory."""
        from maco_lib.kernels.lines import LINE_DATA

        return num_bytes <= self.max_bytes and num_bytes % LINE_DATA == 0

    def in_lines(self, tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
        from maco_lib.kernels.one_shot import one_shot

        box = mailbox(group, tensor.device)
        one_shot(tensor, inboxes=box.inboxes, counter=box.counter, rank=box.rank)


@dataclass(frozen=True)
class PullOneShot(SharedSum):
    """Out of place: the peers read the input to the end."""

    num_ctas: int = 64
    in_place = False

    def reduce(self, region: Region, source: torch.Tensor, result: torch.Tensor, group: dist.ProcessGroup) -> None:
        shared = peers(group, source.device)
        offset = source.data_ptr() - region.base.data_ptr()
        # By rank, not beginning with the next one: the order of the sum is to be the same everywhere.
        sources = tuple(address + offset for address in region.addresses)
        own = (result.data_ptr(),)
        shared.sum(sources, own, 0, source.numel(), source.dtype, num_ctas=self.num_ctas, enter=True, leave=True)
