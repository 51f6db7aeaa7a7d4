"""NCCL through torch.distributed: the default on GPUs, and the same with a limit on its CTAs.

Wins at large sizes and for every collective but all-reduce. Its CTAs compete with a matmul for the SMs; a limit of N
CTAs (`nccl_cta<N>`, a communicator of its own) leaves more of them to the matmul and lowers its own bandwidth.

Collectives run on the current stream (torch 2.8 and later, `async_op=False`), so the priority of an overlapped NCCL
kernel is that of the side stream it is issued on; the option `is_high_priority_stream` would not change it.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from maco_lib import state as states
from maco_lib.comm import c10d
from maco_lib.comm.record import Operation
from maco_lib.comm.symmetric import require_no_capture
from maco_lib.state import State


@dataclass(frozen=True)
class Nccl:
    """`max_ctas`: None for the caller's group as it is, else the largest number of CTAs of a collective.

    Needs an NVIDIA GPU per rank and a process group with the NCCL backend.
    """

    name: str
    max_ctas: int | None = None

    def unavailable(self, collective: str, device: torch.device, group: dist.ProcessGroup) -> str | None:
        """Why it cannot run here, or None."""
        if device.type != "cuda":
            return f"NCCL runs on GPUs, these ranks are on {device.type}"
        if "cuda:nccl" not in dist.get_backend_config(group):
            return f"the process group's backends are {dist.get_backend_config(group)}, without NCCL for GPUs"
        return None if self.max_ctas is None else partial_group(self.name, group) or None

    def operation(
        self, name: str, numel: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup
    ) -> Operation:
        """The collective on fresh buffers; collective itself when the limited communicator has yet to be made."""
        limited = group if self.max_ctas is None else limited_group(group, device, self.max_ctas)
        return c10d.operation(name, numel, dtype, device, limited)

    def all_reduce(self, tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False) -> dist.Work | None:
        """Sum `tensor` in place on the current stream; collective itself when the limited communicator is made."""
        limited = group if self.max_ctas is None else limited_group(group, tensor.device, self.max_ctas)
        return c10d.issue("all_reduce", tensor, tensor, limited, async_op)


def partial_group(name: str, group: dist.ProcessGroup) -> str:
    """Why a backend that makes a communicator of its own is not for `group`, or "": all ranks must take part in it."""
    if group.size() == dist.get_world_size():
        return ""
    return f"{name} makes a communicator, which takes all {dist.get_world_size()} ranks; the group has {group.size()}"


def limited_group(group: dist.ProcessGroup, device: torch.device, max_ctas: int) -> dist.ProcessGroup:
    """A group of the same ranks whose collectives use at most `max_ctas` CTAs; made once. Collective.

    Raises RuntimeError if that would be while a graph is captured.
    """
    return states.of(group, device).get(new_group, max_ctas)


def new_group(state: State, max_ctas: int) -> dist.ProcessGroup:
    """What `limited_group` makes."""
    require_no_capture("make a communicator")
    options = dist.ProcessGroupNCCL.Options()
    options.config.min_ctas = 1
    options.config.max_ctas = max_ctas
    return dist.new_group(dist.get_process_group_ranks(state.group), backend="nccl", pg_options=options)


BACKENDS = (Nccl("nccl"), Nccl("nccl_cta4", max_ctas=4), Nccl("nccl_cta8", max_ctas=8))
PLACE = 0
