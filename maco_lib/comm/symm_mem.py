"""All-reduce over torch's symmetric memory: peers read each other's buffers, no NVLink multicast.

One-shot: every rank reads all of every peer's tensor, (P - 1) S bytes in one step; wins at small sizes. Two-shot: every
rank sums its share, then reads the others' sums, 2 (P - 1) S / P bytes; wins over NCCL at medium and large sizes on few
GPUs. Both need GPUs that can reach each other's memory, and tensors that live in a buffer rendezvoused by all ranks.
The `multimem` operations are left out on purpose: they need multicast objects.
"""

import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric

from maco_lib.comm.record import Operation, collective

DTYPES = (torch.bfloat16, torch.float32)
ALIGNMENT = 16
# Growing costs a rendezvous of all ranks: start with what most points fit into.
MIN_WORKSPACE = 2**26


@dataclass(frozen=True)
class SymmetricMemory:
    """`shots`: 1 (out of place) or 2 (in place)."""

    name: str
    shots: int
    needs: str = "GPUs of one host that can access each other's memory, bf16 or fp32, whole 16-byte words"

    def unavailable(self, collective: str, device: torch.device, group: dist.ProcessGroup) -> str | None:
        """Why it cannot run here, or None."""
        if collective != "all_reduce":
            return f"torch's one-shot and two-shot kernels are all-reduces, not {collective}"
        if device.type != "cuda":
            return f"symmetric memory is for GPUs, these ranks are on {device.type}"
        if group.size() > torch.cuda.device_count():
            return f"{group.size()} ranks on {torch.cuda.device_count()} visible GPUs: they are not on one host"
        others = [index for index in range(torch.cuda.device_count()) if index != device.index]
        unreachable = [other for other in others if not torch.cuda.can_device_access_peer(device, other)]
        return f"GPU {device.index} cannot access the memory of GPU {unreachable[0]}" if unreachable else None

    def operation(
        self, name: str, numel: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup
    ) -> Operation:
        """The all-reduce on the shared symmetric buffer: operations of one process reuse it, one at a time.

        Collective. Raises ValueError on another collective, type or a size that is not whole 16-byte words.
        """
        if name != "all_reduce":
            raise ValueError(f"{self.name} has no {name!r}; it has all_reduce")
        if dtype not in DTYPES:
            raise ValueError(f"{self.name} has no kernel for {dtype}; it has {', '.join(map(str, DTYPES))}")
        if numel * dtype.itemsize % ALIGNMENT:
            raise ValueError(f"{self.name}: {numel} elements of {dtype} are not whole {ALIGNMENT}-byte words")
        collective(name).numels(numel, group.size())
        source = workspace(numel * dtype.itemsize, device, group).view(dtype)
        tag = group.group_name
        if self.shots == 2:
            return Operation(name, source, source, lambda src, dst, _: two_shot(src, tag))
        return Operation(name, source, torch.empty_like(source), lambda src, dst, _: one_shot(src, dst, tag))


def one_shot(source: torch.Tensor, result: torch.Tensor, tag: str) -> None:
    torch.ops.symm_mem.one_shot_all_reduce_out(source, "sum", tag, result)


def two_shot(source: torch.Tensor, tag: str) -> None:
    torch.ops.symm_mem.two_shot_all_reduce_(source, "sum", tag)


_BUFFERS: "weakref.WeakKeyDictionary[dist.ProcessGroup, torch.Tensor]" = weakref.WeakKeyDictionary()


def workspace(num_bytes: int, device: torch.device, group: dist.ProcessGroup) -> torch.Tensor:
    """The first `num_bytes` of the group's symmetric buffer (uint8), which grows when needed. Collective."""
    buffer = _BUFFERS.get(group)
    if buffer is None or buffer.numel() < num_bytes:
        capacity = max(MIN_WORKSPACE, 1 << (num_bytes - 1).bit_length())
        buffer = symmetric.empty(capacity, dtype=torch.uint8, device=device)
        symmetric.rendezvous(buffer, group.group_name)
        _BUFFERS[group] = buffer
    return buffer[:num_bytes]
