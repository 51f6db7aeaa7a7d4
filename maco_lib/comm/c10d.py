"""Issue a collective through torch.distributed: what the NCCL and gloo backends and `overlap.start` share."""

import torch
import torch.distributed as dist

from maco_lib.comm.record import COLLECTIVES, Operation, collective

# torch 2.13 renames these two and warns of the old names, which are all that 2.11 has.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool) -> dist.Work | None:
    """`dist.all_reduce` without what that looks at in every call: a third of its cost to the host."""
    options = dist.AllreduceOptions()
    options.asyncOp = async_op
    work = group.allreduce([tensor], options)
    if not async_op and work is not None:
        work.wait()  # on a GPU there is none, or the stream's
    return work if async_op else None


def issue(
    name: str, source: torch.Tensor, result: torch.Tensor, group: dist.ProcessGroup | None, async_op: bool = False
) -> dist.Work | None:
    """Sum, scatter, gather or exchange flat contiguous tensors; `all_reduce` works in place, so `result is source`."""
    if name == "all_reduce":
        return all_reduce(result, group or dist.group.WORLD, async_op)
    if name == "reduce_scatter":
        return reduce_scatter(result, source, group=group, async_op=async_op)
    if name == "all_gather":
        return all_gather(result, source, group=group, async_op=async_op)
    if name == "all_to_all":
        return dist.all_to_all_single(result, source, group=group, async_op=async_op)
    raise ValueError(f"unknown collective {name!r}; the collectives are {', '.join(COLLECTIVES)}")


def operation(name: str, numel: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup) -> Operation:
    """The collective on fresh buffers, `numel` elements in the larger one; contents are undefined."""
    source_numel, result_numel = collective(name).numels(numel, group.size())
    source = torch.empty(source_numel, dtype=dtype, device=device)
    result = source if name == "all_reduce" else torch.empty(result_numel, dtype=dtype, device=device)
    return Operation(name, source, result, lambda src, dst, async_op: issue(name, src, dst, group, async_op))
