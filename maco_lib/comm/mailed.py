"""Our all-reduces through the mailbox (`comm.mailbox`): one launch, from anywhere in memory, without a copy.

maco_ll       in lines of 16 bytes: every rank sends all to all others, one way over the link, 2 (P - 1) S bytes
maco_ll128    in lines of 128 bytes: as well with 2 ranks, 16 / 15 S bytes; with more by the owners of the blocks, two
              ways and 16 / 15 of the 2 (P - 1) / P S bytes that are the least there can be

Above `max_bytes` each is the push two-shot (`two_shot`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from maco_lib import state as states
from maco_lib.comm.mailbox import Mailbox
from maco_lib.comm.symmetric import ALIGNMENT, Region
from maco_lib.comm.two_shot import PushTwoShot
from maco_lib.kernels.inbox import LINE_DATA
from maco_lib.nvml import without_nvlink


@dataclass(frozen=True)
class Mailed(PushTwoShot):
    """Base of both. `max_bytes`: the largest tensor that goes through the mailbox; num_ctas: for larger ones."""

    num_ctas: int = 128
    max_bytes: int = 2**18

    def send(self, tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
        """Sum `tensor` in place, through the mailbox."""
        self.kernel()(tensor, states.of(group, tensor.device).get(Mailbox).box)

    def kernel(self) -> Callable:
        raise NotImplementedError

    def reduce(self, region: Region, source: torch.Tensor, result: torch.Tensor, group: dist.ProcessGroup) -> None:
        if source.nbytes <= self.max_bytes:
            self.send(source, group)
        else:
            super().reduce(region, source, result, group)

    def all_reduce(self, tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False) -> None:
        """As its base's, but without a copy of up to `max_bytes` wherever they lie, in whole multiples of 8."""
        self.require("all_reduce", tensor.dtype)
        if tensor.nbytes and self.anywhere(tensor.nbytes) and tensor.data_ptr() % ALIGNMENT == 0:
            self.send(tensor.view(-1), group)
        else:
            super().all_reduce(tensor, group)

    def anywhere(self, num_bytes: int) -> bool:
        """Whether so many bytes are summed where they lie, in whatever memory."""
        return num_bytes <= self.max_bytes and num_bytes % LINE_DATA == 0


@dataclass(frozen=True)
class OneShotLines(Mailed):
    def kernel(self) -> Callable:
        from maco_lib.kernels.one_shot import one_shot

        return one_shot


@dataclass(frozen=True)
class LL128(Mailed):
    """Needs Hopper GPUs of one host, joined by NVLink, bf16, fp16 or fp32."""

    max_bytes: int = 2**22

    def unavailable(self, collective: str, device: torch.device, group: dist.ProcessGroup) -> str | None:
        """Why it cannot run here, or None."""
        if why := super().unavailable(collective, device, group):
            return why
        if torch.cuda.get_device_capability(device)[0] != 9:
            return f"{self.name} is compiled for Hopper GPUs, and {device} is none"
        apart = without_nvlink()
        return f"{self.name} needs NVLink, by which GPUs {apart} are not known to be joined" if apart else None

    def kernel(self) -> Callable:
        from maco_lib.kernels.ll128 import ll128_sum

        return ll128_sum


BACKENDS = (OneShotLines("maco_ll"), LL128("maco_ll128"))
PLACE = 5
