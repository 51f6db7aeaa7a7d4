"""gloo through torch.distributed: the collectives of CPU ranks, driven by a thread of the host.

Wins nothing: it is there so that everything runs, is tested and can be studied without a GPU. torch 2.11 and later have
all four collectives, bf16 among the types.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from maco_lib.comm import c10d
from maco_lib.comm.record import Operation


@dataclass(frozen=True)
class Gloo:
    """Needs CPU ranks and a process group with the gloo backend."""

    name: str = "gloo"

    def unavailable(self, collective: str, device: torch.device, group: dist.ProcessGroup) -> str | None:
        """Why it cannot run here, or None."""
        if device.type != "cpu":
            return f"gloo is for CPU ranks here, these are on {device.type}"
        if "cpu:gloo" not in dist.get_backend_config(group):
            return f"the process group's backends are {dist.get_backend_config(group)}, without gloo for CPUs"
        return None

    def operation(
        self, name: str, numel: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup
    ) -> Operation:
        """The collective on fresh buffers."""
        return c10d.operation(name, numel, dtype, device, group)

    def all_reduce(self, tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False) -> dist.Work | None:
        """Sum `tensor` in place."""
        return c10d.issue("all_reduce", tensor, tensor, group, async_op)


BACKENDS = (Gloo(),)
PLACE = 8
