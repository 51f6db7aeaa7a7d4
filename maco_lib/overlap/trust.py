"""Whether an all-reduce can be trusted here: its sums are compared to the exact ones before it is chosen."""

import random

import torch
import torch.distributed as dist

from maco_lib import comm
from maco_lib.comm import symmetric
from maco_lib.timing import decided, first_error

NUM_BYTES = 2**16


def working_dtype(device: torch.device) -> torch.dtype:
    """One that the device multiplies at full speed, which for bf16 not every one does."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def tensors(source: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """A tensor like `source` in symmetric memory, where there is any, and one that is not."""
    device = source.device
    if symmetric.unreachable(device, group):
        return [torch.empty_like(source)]
    region = symmetric.memory(group, device).staging(symmetric.whole(source.nbytes))
    return [region.base[: source.nbytes].view(source.dtype), torch.empty_like(source)]


def summing(name: str, tensor: torch.Tensor, group: dist.ProcessGroup) -> comm.Operation:
    """The all-reduce of a tensor of the user's, over the backend `name`."""
    return comm.Operation(
        "all_reduce", tensor, tensor, lambda source, result, async_op: comm.all_reduce(result, name, group, async_op)
    )


def fault(name: str, device: torch.device, group: dist.ProcessGroup, num_bytes: int = NUM_BYTES) -> str:
    """Why the backend's sums cannot be trusted here, "" if they are right on every rank. Collective."""
    seed, dtype = decided(random.getrandbits(32), group), working_dtype(device)
    numel = num_bytes // dtype.itemsize
    reference = comm.Reference("all_reduce", numel, dtype, device, group.rank(), group.size(), seed)
    try:
        found = [comm.check(summing(name, tensor, group), reference) for tensor in tensors(reference.source, group)]
    except Exception as error:  # also a compiler's that Triton does not find: the other ranks wait to be told
        found = [f"{name}: {type(error).__name__}: {error}"]
    return first_error("; ".join(filter(None, found)), group)
