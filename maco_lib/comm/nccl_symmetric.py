"""NCCL's all-reduce on registered symmetric buffers: its kernels address every rank's buffer directly.

Wins over plain NCCL on the GPUs of one host, at small sizes most: nothing is copied through NCCL's own channels, and
fewer CTAs are enough. bf16, fp16, fp32, any number of elements. One rank forms a sum, or (small tensors) all of them in
the same order: bitwise equal on every rank.

NCCL 2.27 and later. The buffers live in memory pools of NCCL's allocator, registered as windows of a communicator of
their own; the caller's group is left as it is. Nothing here asks for NVLink multicast: NCCL_NVLS_ENABLE decides, as it
does for plain NCCL.
"""

import atexit
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from maco_lib import state as states
from maco_lib.comm import c10d
from maco_lib.comm.nccl import partial_group
from maco_lib.comm.record import Operation, collective
from maco_lib.comm.symmetric import ALIGNMENT, MIN_WORKSPACE, require_kernel, require_no_capture, unreachable
from maco_lib.state import State

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_NCCL = (2, 27)
# Either of them at 0 makes NCCL fall back to its ordinary kernels without a word.
SWITCHES = ("NCCL_CUMEM_ENABLE", "NCCL_WIN_ENABLE")


class RegisteredMemory:
    """Buffers that are windows of a communicator with exactly `num_ctas` CTAs. Making one is collective.

    A pool that is registered when its communicator goes aborts the process at exit, when it is freed: `finalize`
    deregisters. torch calls it when the default group is destroyed, Python at exit.
    """

    def __init__(self, state: State, num_ctas: int):
        require_no_capture("make a communicator")
        group, device = state.group, state.device
        self.device = device
        options = dist.ProcessGroupNCCL.Options()
        options.config.min_ctas = options.config.max_ctas = num_ctas
        self.communicator = dist.new_group(dist.get_process_group_ranks(group), backend="nccl", pg_options=options)
        # A window needs a communicator that exists, which without a `device_id` the first collective makes.
        dist.all_reduce(torch.zeros(1, device=device), group=self.communicator)
        torch.cuda.synchronize(device)
        self.backend = self.communicator._get_backend(device)
        self.pools: list[torch.cuda.MemPool] = []
        self.buffers: list[torch.Tensor] = []
        self.workspace: torch.Tensor | None = None
        finalize_before_destruction(self)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """A registered buffer (uint8) with a pool of its own, so that it begins where the window does. Collective."""
        require_no_capture(f"register {num_bytes} bytes", "once before, with as many")
        with torch.cuda.device(self.device):
            pool = torch.cuda.MemPool(self.backend.mem_allocator)
            with torch.cuda.use_mem_pool(pool):
                buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
            self.backend.register_mem_pool(pool, symm=True)
        self.pools.append(pool)
        self.buffers.append(buffer)
        return buffer

    def staging(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """The first `numel` elements of the workspace, which grows when needed. Collective when it does."""
        num_bytes = numel * dtype.itemsize
        if self.workspace is None or self.workspace.nbytes < num_bytes:
            self.workspace = self.allocate(max(MIN_WORKSPACE, 1 << (num_bytes - 1).bit_length()))
        return self.workspace[:num_bytes].view(dtype)

    def holds(self, tensor: torch.Tensor) -> bool:
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        starts = ((buffer.data_ptr(), buffer.nbytes) for buffer in self.buffers)
        return any(start <= begin and end <= start + num_bytes for start, num_bytes in starts)

    def sum(self, tensor: torch.Tensor) -> None:
        c10d.issue("all_reduce", tensor, tensor, self.communicator)

    def finalize(self) -> None:
        """Deregister and let go of everything; what still runs is waited for. May be called again."""
        if not self.pools:
            return
        torch.cuda.synchronize(self.device)
        self.workspace = None
        while self.pools:
            self.backend.deregister_mem_pool(self.pools[-1])
            self.buffers.pop()
            self.pools.pop()

    def destroy(self) -> None:
        """`finalize`, and give the communicator back, which nothing keeps any more. Collective."""
        self.finalize()
        atexit.unregister(self.finalize)
        world = dist.distributed_c10d._world
        if self in world.comms:
            world.comms.remove(self)
        # Not if the default group has been destroyed, and every communicator with it.
        if self.communicator in world.pg_map:
            dist.destroy_process_group(self.communicator)


def finalize_before_destruction(owner: object) -> None:
    """Have `owner.finalize()` called when torch destroys the default group, before any communicator, and at exit."""
    # torch has no public hook; these are what `destroy_process_group` finalizes first (torch 2.11 to 2.13).
    dist.distributed_c10d._world.comms.append(owner)
    atexit.register(owner.finalize)


def memory(group: dist.ProcessGroup, device: torch.device, num_ctas: int) -> RegisteredMemory:
    """The registered memory of `group` for that number of CTAs; made once. Collective.

    Raises RuntimeError if that would be while a graph is captured.
    """
    return states.of(group, device).get(RegisteredMemory, num_ctas)


def release(group: dist.ProcessGroup) -> None:
    """Give back what `group` has registered, and its communicators: its operations and tensors must not be used any
    more, and graphs that were captured with them must be gone.

    Every rank calls it. Destroying the default group does the same for all groups.
    """
    for state in states.of_group(group):
        for owner in state.forget(RegisteredMemory):
            owner.destroy()


@dataclass(frozen=True)
class NcclSymmetric:
    """`num_ctas`: of its kernels. NCCL's own model of the time would take about 5 on Hopper, above small sizes.

    Needs NVIDIA GPUs of one host that can access each other's memory, NCCL 2.27 or later, bf16, fp16 or fp32.
    """

    name: str
    num_ctas: int = 16

    def unavailable(self, collective: str, device: torch.device, group: dist.ProcessGroup) -> str | None:
        """Why it cannot run here, or None."""
        if collective != "all_reduce":
            return f"{self.name} is an all-reduce, not {collective}"
        if why := unreachable(device, group):
            return why
        if "cuda:nccl" not in dist.get_backend_config(group):
            return f"the process group's backends are {dist.get_backend_config(group)}, without NCCL for GPUs"
        if why := partial_group(self.name, group):
            return why
        version = torch.cuda.nccl.version()
        if version[:2] < MIN_NCCL:
            return f"{self.name} needs NCCL {'.'.join(map(str, MIN_NCCL))}, this is {'.'.join(map(str, version))}"
        off = [name for name in SWITCHES if os.environ.get(name) == "0"]
        return f"{off[0]}=0 switches NCCL's symmetric memory off" if off else None

    def require(self, name: str, dtype: torch.dtype) -> None:
        """Raise ValueError on another collective or a type without a kernel."""
        require_kernel(self.name, DTYPES, name, dtype)

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup
    ) -> torch.Tensor:
        """An uninitialised tensor that `all_reduce` sums without a copy, kept until the group goes. Collective."""
        self.require("all_reduce", dtype)
        numel = math.prod(shape)
        buffer = memory(group, device, self.num_ctas).allocate(max(1, numel) * dtype.itemsize)
        return buffer[: numel * dtype.itemsize].view(dtype).view(shape)

    def operation(
        self, name: str, numel: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup
    ) -> Operation:
        """The all-reduce in the group's registered workspace: operations of one process share it, one at a time.

        Collective. Raises ValueError on another collective or type, or no elements.
        """
        self.require(name, dtype)
        collective(name).numels(numel, group.size())
        owner = memory(group, device, self.num_ctas)
        source = owner.staging(numel, dtype)
        return Operation(name, source, source, lambda src, dst, _: owner.sum(src))

    def all_reduce(self, tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False) -> None:
        """Sum contiguous `tensor` in place on the current stream; without a copy if it came from `empty`.

        (And, where it is a part of such a tensor, if it begins at 16 bytes.)
        The first call, and the first beyond the workspace's size, is collective on the host: make it before a graph is
        captured. `async_op` changes nothing: the stream orders it.
        """
        self.require("all_reduce", tensor.dtype)
        owner, flat = memory(group, tensor.device, self.num_ctas), tensor.view(-1)
        # NCCL 2.28 sums a part of a window that begins within an access wrongly.
        if owner.holds(flat) and flat.data_ptr() % ALIGNMENT == 0:
            owner.sum(flat)
            return
        staged = owner.staging(flat.numel(), flat.dtype)
        staged.copy_(flat)
        owner.sum(staged)
        flat.copy_(staged)


BACKENDS = (NcclSymmetric("nccl_symmetric"),)
PLACE = 1
