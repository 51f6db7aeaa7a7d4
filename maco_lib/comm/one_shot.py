"""Our all-reduce for the sizes of decoding: every rank sends all to all others, in lines that need no flag.

One launch and one way over the link, from anywhere in memory, without a copy. Above `max_bytes` the bytes count, of
which it moves 2 (P - 1) S: from there on it is the push two-shot (`two_shot`).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from maco_lib.comm.mailbox import mailbox
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
        from maco_lib.kernels.lines import LINE_DATA

        self.require("all_reduce", tensor.dtype)
        in_place = tensor.nbytes % LINE_DATA == 0 and tensor.data_ptr() % ALIGNMENT == 0
        if 0 < tensor.nbytes <= self.max_bytes and in_place:
            self.in_lines(tensor.view(-1), group)
        else:
            super().all_reduce(tensor, group)

    def in_lines(self, tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
        from maco_lib.kernels.one_shot import one_shot

        box = mailbox(group, tensor.device)
        one_shot(tensor, inboxes=box.inboxes, counter=box.counter, rank=box.rank)
