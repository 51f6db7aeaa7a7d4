"""`linear_all_reduce`: a row-parallel linear layer's matmul and the all-reduce of its result, as one operation.

    y = linear_all_reduce(x, weight)                                # the fastest plan of this machine
    y = linear_all_reduce(x, weight, bias, residual, plan=LinearPlan("chunked", "symm_mem_two_shot", num_chunks=4))

It is the custom operator `maco::linear_all_reduce`, so torch.compile keeps it whole, and plan="auto" chooses by the
number of rows that it meets at run time. Under a CUDA graph: run it once before the capture with the same plan and
shapes; buffers are made then, by all ranks together, and "auto" captures only what has run.
"""

import functools
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from maco_lib.comm import DTYPES, backend
from maco_lib.overlap import linear_auto
from maco_lib.overlap.custom_op import custom_op
from maco_lib.overlap.linear_plan import AUTO, TECHNIQUES, LinearPlan
from maco_lib.overlap.linear_techniques import chunked, decode, persistent, sequential
from maco_lib.overlap.linear_techniques.persistent_time import parse_tiling
from maco_lib.overlap.linear_techniques.problem import Problem, flattened
from maco_lib.overlap.plan import DEFAULT_BACKEND
from maco_lib.overlap.validation import check_agreement, device_kinds, group_name, require_operands, unavailable

RUN: dict[str, Callable[[Problem, LinearPlan], None]] = {
    "sequential": lambda problem, plan: sequential.run(problem),
    "chunked": lambda problem, plan: chunked.run(problem, plan.num_chunks),
    "persistent": lambda problem, plan: persistent.run(problem, parse_tiling(plan.tiling)),
    "decode": lambda problem, plan: decode.run(problem),
}
assert tuple(RUN) == TECHNIQUES
parsed = functools.lru_cache(LinearPlan.parse)


def linear_all_reduce(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    plan: LinearPlan | Literal["auto"] | None = "auto",
    *,
    check: bool = False,
) -> torch.Tensor:
    """Sum over the ranks of x @ weight.T, + bias once, + residual once. Every rank of the group calls it, in one order.

    x: (..., K), bf16, fp16, fp32 or fp64; weight: (N, K), as torch.nn.Linear holds it; K is this rank's share, which
    may differ between ranks. bias: (N,). residual: (..., N). Both are the same on every rank; all are of x's type and
    on its device.
    group: None for all ranks; of one rank, or no process group at all: the plain linear layer.
    plan: "auto", a `LinearPlan`, or None for the sequential one over the default collective. "auto" takes the fastest
        plan that `linear_auto.tune_linear` measured for about as many rows, without that the one that a shipped table
        of this GPU's model says is faster (`linear_tables`), else the sequential one. Its first call for a weight's
        shape is collective on the host. Where K differs between the ranks give a plan: "auto" is then the default
        sequential one, and not to be used if a weight of the same N has the same K on some of the ranks only.
    check: first compare shape, type and plan across the ranks (blocks the host; not for captured or compiled code).

    Calls for one group are to be issued from one current stream, or from streams that the caller orders: they share
    buffers and flags. The persistent kernel needs all SMs of every rank: an unplanned collective (`start` without a
    plan, torch's own) may not be in flight beside "auto".

    Returns (..., N), a new tensor of x's type; the same bits on every rank, and every time for the same input and plan.
    For inference: there is no backward, so call it under torch.no_grad() or with tensors that require no gradient.

    Raises ValueError on shapes, types or devices that do not fit each other or the group, on inputs that require
    gradients, and on a plan that cannot be followed here: here alone, but with `check` on every rank, and there also
    when the ranks disagree.
    """
    operands = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    plan = LinearPlan() if plan is None else plan
    if check:
        check_agreement(lambda: described(operands, group, plan), group)
    of_group = require_call(operands, group, plan)
    return torch.ops.maco.linear_all_reduce(x, weight, bias, residual, of_group, plan if plan == AUTO else plan.name)


def require_call(
    operands: dict[str, torch.Tensor | None], group: dist.ProcessGroup | None, plan: LinearPlan | str
) -> str:
    """The name of the group for `operator`; ValueError on what it cannot be called with."""
    require_operands(operands, ("bias", "residual"), "linear_all_reduce")
    if plan != AUTO and not isinstance(plan, LinearPlan):
        raise ValueError(f"plan = {plan!r} is not a LinearPlan, 'auto' or None")
    return group_name(group, "linear_all_reduce")


def described(operands: dict[str, torch.Tensor | None], group: dist.ProcessGroup | None, plan: LinearPlan | str) -> str:
    """What is to be the same on every rank, in words; raises ValueError where this one refuses the call."""
    require_call(operands, group, plan)
    shape, x = result_shape(*operands.values()), operands["x"]
    usable_backend("" if plan == AUTO else plan.backend, x.device, group or dist.group.WORLD)
    given = ", ".join(operand for operand, tensor in operands.items() if tensor is not None)
    return f"linear_all_reduce({given}; {plan}) of {shape} {x.dtype}"


def fake(x, weight, bias, residual, group_name, plan):
    return x.new_empty(result_shape(x, weight, bias, residual))


@custom_op("linear_all_reduce", fake)
def operator(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    group_name: str,
    plan: str,
) -> torch.Tensor:
    """`linear_all_reduce` with the group and the plan by their names ("" for a group of one)."""
    shape = result_shape(x, weight, bias, residual)
    chosen = LinearPlan() if plan == AUTO else parsed(plan)
    if chosen.backend:
        backend(chosen.backend)  # a wrong name is an error on a single rank, too
    if not group_name:
        product = torch.nn.functional.linear(x, weight, bias)
        return product if residual is None else product.add_(residual)
    group = _resolve_process_group(group_name)
    name = usable_backend(chosen.backend, x.device, group)
    result = x.new_empty(shape)
    if not result.numel():
        return result
    flat_x, flat_residual = flattened(x), None if residual is None else flattened(residual)
    call = (len(flat_x), weight, (bias is not None, residual is not None))
    planner = linear_auto.planner(group, x.device) if plan == AUTO else None
    if planner:
        chosen = planner.plan(*call)
        if chosen.backend not in ("", name):
            name = usable_backend(chosen.backend, x.device, group)
    RUN[chosen.technique](Problem(flat_x, weight, bias, flat_residual, flattened(result), name, group), chosen)
    if planner:
        planner.ran(chosen, *call)
    return result


def result_shape(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> tuple[int, ...]:
    """The shape of the result; ValueError naming what does not fit."""
    if x.dtype not in DTYPES.values():
        raise ValueError(f"x is of {x.dtype}; the types are {', '.join(map(str, DTYPES.values()))}")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)} instead of (N, K)")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)} instead of (..., {weight.shape[1]}): weight's K")
    shape = (*x.shape[:-1], weight.shape[0])
    for name, tensor, valid in (("bias", bias, shape[-1:]), ("residual", residual, shape)):
        if tensor is not None and tuple(tensor.shape) != valid:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} instead of {valid}")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} is of {tensor.dtype} instead of x's {x.dtype}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} instead of x's {x.device}")
    return shape


def usable_backend(name: str, device: torch.device, group: dist.ProcessGroup) -> str:
    """The name with the default filled in; ValueError where the group or the backend does not work on the device."""
    kinds = device_kinds(group)
    if device.type not in kinds:
        where = " or ".join(kinds)
        raise ValueError(f"x is on {device}, but the {dist.get_backend(group)} group works on {where}")
    name = name or DEFAULT_BACKEND[device.type]
    if why := unavailable(name, device, group):
        raise ValueError(f"plan with backend {name!r}: {why}")
    return name
