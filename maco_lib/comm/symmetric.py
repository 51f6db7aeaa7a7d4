"""Memory that every rank of a host can address, and the base of the all-reduces that work in it.

A `Region` is a buffer rendezvoused by all ranks of a group: each knows the address of everyone's. `symmetric_empty`
gives the user a tensor in one, which these backends sum without a copy; any other tensor is staged through the group's
workspace. No NVLink multicast: the `multimem` operations are left out on purpose.
"""

import functools
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric

from maco_lib import state as states
from maco_lib.comm.record import Operation, collective
from maco_lib.state import State

ALIGNMENT = 16
# A whole number of these is summed without a copy: the widest accesses of every kernel here (16 elements of fp32).
GRANULE_BYTES = 64
# Growing costs a rendezvous of all ranks: start with what most tensors fit into.
MIN_WORKSPACE = 2**26
# Of the workspace, kept: beyond, all are forgotten, so that changing sizes take no more memory.
MAX_VIEWS = 1024


@dataclass(frozen=True)
class Region:
    """A symmetric buffer. `base`: this rank's bytes (uint8); `addresses[rank]`: where it starts for each rank."""

    base: torch.Tensor
    handle: object

    @functools.cached_property
    def addresses(self) -> list[int]:
        return list(self.handle.buffer_ptrs)

    @functools.cached_property
    def ends(self) -> tuple[int, int]:
        """Where it begins and ends on this rank."""
        return self.base.data_ptr(), self.base.data_ptr() + self.base.nbytes

    def peer(self, rank: int, tensor: torch.Tensor) -> torch.Tensor:
        """`rank`'s copy of `tensor`, a flat tensor of this region."""
        offset = (tensor.data_ptr() - self.base.data_ptr()) // tensor.itemsize
        return self.handle.get_buffer(rank, tensor.shape, tensor.dtype, offset)


class Memory:
    """What a group has allocated: `workspace` grows as needed, `regions` live as long as the group."""

    def __init__(self, state: State):
        self.group_name, self.device = state.group.group_name, state.device
        self.workspace: Region | None = None
        self.views: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}
        self.regions: list[Region] = []

    def allocate(self, num_bytes: int) -> Region:
        """A new region. Collective; RuntimeError while a graph is captured."""
        require_no_capture(f"share {num_bytes} bytes", "once before, with as many")
        base = symmetric.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return Region(base, symmetric.rendezvous(base, self.group_name))

    def grown(self, region: Region | None, num_bytes: int, least: int = 1) -> Region:
        """`region` if it has `num_bytes`, else a new one of a power of two. Collective when one has to be made.

        One that was outgrown is kept: graphs that were captured with it go on using it.
        """
        if region is not None and region.base.nbytes >= num_bytes:
            return region
        if region is not None:
            self.regions.append(region)
        return self.allocate(max(least, 1 << (num_bytes - 1).bit_length()))

    def staging(self, num_bytes: int) -> Region:
        """The workspace, of at least `num_bytes`. Collective when it has to grow."""
        before, self.workspace = self.workspace, self.grown(self.workspace, num_bytes, MIN_WORKSPACE)
        if self.workspace is not before:
            self.views.clear()
        return self.workspace

    def staged(self, numel: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(in whole granules, its first `numel` elements): where a tensor goes in the workspace; as `staging`."""
        made = self.views.get((numel, dtype))
        if made is None:
            num_bytes = whole(numel * dtype.itemsize)
            flat = self.staging(num_bytes).base[:num_bytes].view(dtype)
            if len(self.views) >= MAX_VIEWS:
                self.views.clear()
            made = self.views[numel, dtype] = flat, flat[:numel]
        return made

    def find(self, tensor: torch.Tensor) -> Region | None:
        """The region that holds `tensor`."""
        begin = tensor.data_ptr()
        end = begin + tensor.nbytes
        for region in (self.workspace, *self.regions):
            if region is not None and region.ends[0] <= begin and end <= region.ends[1]:
                return region
        return None


def memory(group: dist.ProcessGroup, device: torch.device) -> Memory:
    """The symmetric memory of `group` on this rank's GPU."""
    return states.of(group, device).get(Memory)


def require_no_capture(what: str, when: str = "once before") -> None:
    """Raise RuntimeError while a graph is captured, in which nothing can be made that all ranks share."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"cannot {what} while a graph is captured: call {when}")


def whole(num_bytes: int) -> int:
    """`num_bytes` rounded up to whole granules."""
    return -(-num_bytes // GRANULE_BYTES) * GRANULE_BYTES


def symmetric_empty(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """An uninitialised tensor that the symmetric-memory backends sum in place without a copy. Collective.

    It is kept until the group goes: allocate once, at setup, not per step. Raises ValueError on ranks that cannot reach
    each other's memory.
    """
    group = group or dist.group.WORLD
    if why := unreachable(device, group):
        raise ValueError(f"symmetric_empty: {why}")
    numel = math.prod(shape)
    region = memory(group, device).allocate(whole(max(1, numel) * dtype.itemsize))
    memory(group, device).regions.append(region)
    return region.base[: numel * dtype.itemsize].view(dtype).view(shape)


def unreachable(device: torch.device, group: dist.ProcessGroup) -> str:
    """Why the ranks of `group` cannot address each other's memory, or ""; found out once."""
    return states.of(group, device).get(obstacle_of)


def obstacle_of(state: State) -> str:
    return obstacle(state.device, state.group)


def obstacle(device: torch.device, group: dist.ProcessGroup) -> str:
    """What `unreachable` finds out."""
    if device.type != "cuda":
        return f"symmetric memory is for GPUs, these ranks are on {device.type}"
    if group.size() > torch.cuda.device_count():
        return f"{group.size()} ranks on {torch.cuda.device_count()} visible GPUs: each must see all, on one host"
    if elsewhere := on_other_hosts(group):
        return f"ranks {', '.join(map(str, elsewhere))} of the group are on other hosts"
    mine = torch.cuda.current_device() if device.index is None else device.index
    others = [index for index in range(torch.cuda.device_count()) if index != mine]
    refused = [other for other in others if not torch.cuda.can_device_access_peer(mine, other)]
    return f"GPU {mine} cannot access the memory of GPU {refused[0]}" if refused else ""


def on_other_hosts(group: dist.ProcessGroup) -> list[int]:
    """The ranks of `group` that torchrun has started on other hosts; none if it is not torchrun that started these."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, num_ranks, local_rank, num_local_ranks = (int(os.environ.get(name, -1)) for name in names)
    if (rank, num_ranks) != (dist.get_rank(), dist.get_world_size()) or num_local_ranks < 1:
        return []
    here = range(rank - local_rank, rank - local_rank + num_local_ranks)  # torchrun numbers those of a host in a row
    return [other for other in dist.get_process_group_ranks(group) if other not in here]


def require_kernel(who: str, dtypes: tuple[torch.dtype, ...], name: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless the collective is an all-reduce of one of `dtypes`, which are what the backend has."""
    if name != "all_reduce":
        raise ValueError(f"{who} has no {name!r}; it has all_reduce")
    if dtype not in dtypes:
        raise ValueError(f"{who} has no kernel for {dtype}; it has {', '.join(map(str, dtypes))}")


@dataclass(frozen=True)
class SymmetricAllReduce:
    """Base of the all-reduces in symmetric memory: subclasses say `dtypes`, `in_place` and `reduce`."""

    name: str
    dtypes = (torch.bfloat16, torch.float32)
    in_place = True

    def unavailable(self, collective: str, device: torch.device, group: dist.ProcessGroup) -> str | None:
        """Why it cannot run here, or None."""
        if collective != "all_reduce":
            return f"{self.name} is an all-reduce, not {collective}"
        return unreachable(device, group) or None

    def anywhere(self, num_bytes: int) -> bool:
        """Whether so many bytes are summed where they lie, in whatever memory."""
        return False

    def reduce(self, region: Region, source: torch.Tensor, result: torch.Tensor, group: dist.ProcessGroup) -> None:
        """Sum `source`, a flat tensor of whole granules in `region`, into `result`: itself exactly if `in_place`."""
        raise NotImplementedError

    def require(self, name: str, dtype: torch.dtype) -> None:
        """Raise ValueError on another collective or a type without a kernel."""
        require_kernel(self.name, self.dtypes, name, dtype)

    def operation(
        self, name: str, numel: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup
    ) -> Operation:
        """The all-reduce in the group's workspace: operations of one process share it, one at a time.

        Collective. Raises ValueError on another collective or type, or no elements.
        """
        self.require(name, dtype)
        collective(name).numels(numel, group.size())
        region = memory(group, device).staging(whole(numel * dtype.itemsize))
        source = region.base[: whole(numel * dtype.itemsize)].view(dtype)
        result = source if self.in_place else torch.empty_like(source)
        used = source[:numel]
        return Operation(
            name,
            used,
            used if self.in_place else result[:numel],
            lambda src, dst, _: self.reduce(region, source, result, group),
        )

    def all_reduce(self, tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False) -> None:
        """Sum contiguous `tensor` in place on the current stream; without a copy in a region and of whole granules.

        The first call beyond the workspace's size is collective on the host: make it before a graph is captured.
        """
        self.require("all_reduce", tensor.dtype)
        owner, flat = memory(group, tensor.device), tensor if tensor.dim() == 1 else tensor.view(-1)
        region = owner.find(flat)
        if region is not None and flat.nbytes % GRANULE_BYTES == 0 and flat.data_ptr() % ALIGNMENT == 0:
            source = flat
        else:
            source, used = owner.staged(flat.numel(), flat.dtype)
            region = owner.workspace
            used.copy_(flat)
        if self.in_place:
            result = source
        else:
            fits = source is not flat and flat.numel() == source.numel() and flat.data_ptr() % ALIGNMENT == 0
            result = flat if fits else torch.empty_like(source)
        self.reduce(region, source, result, group)
        if result is not flat:
            flat.copy_(used if result is source else result[: flat.numel()])
