"""Whether a call makes sense: errors that name the offending value and the valid ones."""

import operator
import os
from collections.abc import Callable, Hashable, Iterable

import torch
import torch.distributed as dist

from maco_lib import state as states
from maco_lib.comm import DTYPES, backend, collective
from maco_lib.overlap import sm_limit
from maco_lib.overlap.plan import Plan
from maco_lib.timing import gather


def num_ranks_of(group: dist.ProcessGroup | None, name: str) -> int:
    """The number of ranks of the group that a call of `name` was given; ValueError where it is no group of this rank's.

    1 without torch.distributed, unless this process was started as one of several.
    """
    if not dist.is_initialized():
        if (started := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise ValueError(f"WORLD_SIZE is {started}, but {name} is called before torch.distributed's "
                             "init_process_group: nothing would be summed")  # fmt: skip
        if group is not None:
            raise ValueError(f"the group given to {name} is none any more: torch.distributed is not initialised")
        return 1
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"rank {dist.get_rank()} is not in the group given to {name}")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        hint = "; of a DeviceMesh give mesh.get_group(DIMENSION)" if type(group).__name__ == "DeviceMesh" else ""
        raise ValueError(
            f"group = {group!r} given to {name} is a {type(group).__name__}, not a ProcessGroup or None{hint}"
        )
    if group is not None and group not in dist.distributed_c10d._world.pg_map:
        raise ValueError(f"the group given to {name} was destroyed")
    return dist.get_world_size(group)


def require_computation(compute: Callable, name: str) -> None:
    """Raise ValueError unless `compute` can be called."""
    if not callable(compute):
        what = f"{name} takes a function to run, not a {type(compute).__name__}"
        raise ValueError(f"{what}: {name}(lambda: ..., tensor)")


def row_counts(num_rows: Iterable[int], name: str) -> list[int]:
    """Numbers of rows as ints, numpy's taken too; ValueError on what is no list of ints of 1 or more."""
    try:
        counts = [operator.index(rows) for rows in num_rows]
    except TypeError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(f"num_rows = {num_rows!r} of {name}: it is a list of ints of 1 or more")
    return counts


def validate(tensor: torch.Tensor, name: str, group: dist.ProcessGroup | None) -> int:
    """The number of ranks; raises ValueError naming what is wrong with the call on this rank."""
    collective(name)
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} takes a torch.Tensor, not {type(tensor).__name__}")
    if tensor.dtype not in DTYPES.values():
        raise ValueError(f"{name} of {tensor.dtype}; the types are {', '.join(map(str, DTYPES.values()))}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} needs a contiguous tensor; shape {tuple(tensor.shape)} has strides {tensor.stride()}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"tensor requires a gradient and {name} has no backward: use torch.no_grad()")
    num_ranks = num_ranks_of(group, name)
    if num_ranks == 1:
        return num_ranks
    kinds = device_kinds(group)
    if tensor.device.type not in kinds:
        where = " or ".join(kinds)
        raise ValueError(f"tensor is on {tensor.device}, but the {dist.get_backend(group)} group works on {where}")
    result_shape(name, tensor.shape, num_ranks)
    return num_ranks


def device_kinds(group: dist.ProcessGroup | None) -> list[str]:
    """Device types the group has a backend for here; "cuda" only where there is a GPU."""
    kinds = [entry.split(":")[0] for entry in dist.get_backend_config(group).split(",")]
    return [kind for kind in kinds if kind != "cuda" or torch.cuda.is_available()]


def result_shape(name: str, shape: torch.Size, num_ranks: int) -> tuple[int, ...]:
    """Shape of the result of each rank; ValueError when its first dimension cannot be divided."""
    if name == "all_reduce":
        return tuple(shape)
    if not shape:
        raise ValueError(f"{name} needs a tensor of at least one dimension")
    if name in ("reduce_scatter", "all_to_all") and shape[0] % num_ranks:
        raise ValueError(f"{name}: the first dimension of {tuple(shape)} cannot be divided among {num_ranks} ranks")
    first = {"reduce_scatter": shape[0] // num_ranks, "all_gather": shape[0] * num_ranks, "all_to_all": shape[0]}[name]
    return (first, *shape[1:])


def check_agreement(describe: Callable[[], str], group: dist.ProcessGroup | None) -> None:
    """Raise an error on every rank unless `describe()` raises none and says the same of the call on all. Collective.

    Its error is raised as it is where it comes from, and as a ValueError with its text on the other ranks. Without a
    group, or where this rank is not in it, there is nobody to agree with.
    """
    if not isinstance(group, dist.ProcessGroup | None) or not dist.is_initialized() or dist.get_world_size(group) <= 1:
        return
    described, refused = "", None
    try:
        described = describe()
    except Exception as error:  # whatever it is, the others wait to be told
        refused = error
    text = "" if refused is None else f"{type(refused).__name__}: {refused}"
    every = gather((described, text), group or dist.group.WORLD)
    if refused is not None:
        raise refused
    for rank, (_, error) in enumerate(every):
        if error:
            raise ValueError(f"rank {rank} refuses the call: {error}")
    for rank, (theirs, _) in enumerate(every):
        if theirs != every[0][0]:
            raise ValueError(f"the ranks disagree: rank 0 calls {every[0][0]}, rank {rank} calls {theirs}")


def require_operands(operands: dict[str, torch.Tensor | None], optional: tuple[str, ...], name: str) -> None:
    """Raise ValueError on an operand that is no tensor (or None, if `optional`), or that requires a gradient now."""
    for operand, tensor in operands.items():
        if not isinstance(tensor, torch.Tensor) and (tensor is not None or operand not in optional):
            raise ValueError(f"{operand} is a torch.Tensor, not {type(tensor).__name__}")
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{operand} requires a gradient and {name} has no backward: use torch.no_grad()")


def group_name(group: dist.ProcessGroup | None, name: str) -> str:
    """What a custom operator finds the group by, "" for one of one rank; ValueError where this rank is not in it."""
    return (group or dist.group.WORLD).group_name if num_ranks_of(group, name) > 1 else ""


def require_plan(
    plan: Plan | str,
    tensor: torch.Tensor,
    name: str,
    group: dist.ProcessGroup | None,
    num_ranks: int,
    priority: int = 0,
    computes: bool = True,
) -> Plan | str:
    """The plan with its backend said ("auto" as it is); raises ValueError where it cannot be followed on this rank.

    `computes`: whether the call has a computation to run, as `overlap` has and `start` has not.
    """
    if name != "all_reduce":
        raise ValueError(f"{name} has no plans; plan = {plan!r} is for all_reduce")
    if priority:
        raise ValueError(f"priority = {priority} beside a plan: Plan.urgent chooses the stream")
    if plan == "auto" and computes:
        return plan
    if not isinstance(plan, Plan):
        valid = "a Plan, 'auto' or None" if computes else "a Plan or None ('auto' needs the computation: use overlap)"
        raise ValueError(f"plan = {plan!r} is not {valid}")
    if (plan.compute_first or plan.leads or plan.leaves) and not computes:
        raise ValueError(f"plan = {plan!r}: start has no computation to order it by or take SMs from, use overlap")
    plan = plan.on(tensor.device.type)
    backend(plan.backend)
    if plan.leaves and (why := sm_limit.unavailable(plan.leaves, tensor.device)):
        raise ValueError(f"leaves = {plan.leaves} in the plan: {why}")
    if num_ranks > 1 and (why := unavailable(plan.backend, tensor.device, group or dist.group.WORLD)):
        raise ValueError(f"plan with backend {plan.backend!r}: {why}")
    return plan


def require_call(
    tensor: torch.Tensor,
    name: str,
    group: dist.ProcessGroup | None,
    plan: Plan | str | None,
    priority: int,
    computes: bool = True,
    key: Hashable = None,
    compute: Callable | None = None,
) -> tuple[int, Plan | str | None]:
    """(number of ranks, the plan with its backend said), as `validate` and, where there is a plan, `require_plan`.

    Raises ValueError also on a computation that is none, and on a key of it beside a plan that has no use for it.
    """
    if computes:
        require_computation(compute, "overlap")
    if key is not None and plan != "auto":
        raise ValueError(f"key = {key!r} is for plan='auto', not for {plan!r}")
    num_ranks = validate(tensor, name, group)
    if plan is not None:
        plan = require_plan(plan, tensor, name, group, num_ranks, priority, computes)
    return num_ranks, plan


def described(tensor: torch.Tensor, name: str, plan: Plan | str | None, key: Hashable = None) -> str:
    """What is to be the same on every rank, in words, of a call that this rank does not refuse; plan: as it runs."""
    words = [f"{name} of {tuple(tensor.shape)} {tensor.dtype}"]
    words += [f"by {plan}"] * (plan is not None) + [f"for {key!r}"] * (key is not None)
    return " ".join(words)


def unavailable(name: str, device: torch.device, group: dist.ProcessGroup) -> str:
    """Why the backend `name` cannot all-reduce here, or ""; asked once."""
    return states.of(group, device).get(why_not, name)


def why_not(state: states.State, name: str) -> str:
    return backend(name).unavailable("all_reduce", state.device, state.group) or ""
