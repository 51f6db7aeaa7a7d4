"""`linear_all_reduce`: a row-parallel linear layer's matmul and the all-reduce of its result, as one operation.

    y = linear_all_reduce(x, weight)                                # the fastest plan of this machine
    y = linear_all_reduce(x, weight, bias, residual, plan=LinearPlan("chunked", "symm_mem_two_shot", num_chunks=4))

It is the custom operator `maco::linear_all_reduce`, so torch.compile keeps it whole, and plan="auto" chooses by the
number of rows that it meets at run time. Under a CUDA graph: run it once before the capture with the same plan and
shapes; buffers are made then, by all ranks together, and "auto" captures only what has run.
"""

import functools
import math
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from maco_lib import state as states
from maco_lib.comm import backend
from maco_lib.linear.custom_op import custom_op
from maco_lib.linear.execute import Call, execute, require_device, result_shape, usable_backend
from maco_lib.linear.plan import AUTO, LinearPlan
from maco_lib.linear.planner import planner as planner_of
from maco_lib.overlap import calls
from maco_lib.overlap.validation import check_agreement, group_name, require_operands

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
        plan that `tune_linear` measured for about as many rows, without that the one that a shipped table
        of this GPU's model says is faster (`linear.lookup`), else the sequential one. Its first call for a weight's
        shape is collective on the host. Where K differs between the ranks give a plan: "auto" is then the default
        sequential one, and not to be used if a weight of the same N has the same K on some of the ranks only.
    check: first compare shape, type and plan across the ranks (blocks the host; not for captured or compiled code).

    Calls may come from several streams, also inside the compute of `overlap`: with all that this library issues they
    take turns, in the order in which they are issued, which is to be the same on every rank (`turns.Turns`). Not
    ordered are torch's own collectives, none of which may be in flight beside "auto", as the persistent kernel needs
    all SMs, and replays of graphs: the caller orders those. One thread at a time.

    The first call on a shape makes what it needs, as `State.prepare` does for many; later ones look it up. Where a
    rank does not come, kernels of this library give up after 10 s (`comm.watch`).

    Returns (..., N), a new tensor of x's type; the same bits on every rank, and every time for the same input and plan.
    For inference: there is no backward, so call it under torch.no_grad() or with tensors that require no gradient.

    Raises ValueError on shapes, types or devices that do not fit each other or the group, on inputs that require
    gradients, and on a plan that cannot be followed here: here alone, but with `check` on every rank, and there also
    when the ranks disagree.
    """
    key = None if check else calls.key_of("linear", plan, x, weight, bias, residual)
    if known := calls.found(x, group, key):
        state, call = known
        return call.run(state, x, weight, bias, residual)
    operands = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    plan = LinearPlan() if plan is None else plan
    if check:
        check_agreement(lambda: described(operands, group, plan), group)
    of_group, name = require_call(operands, group, plan), plan if plan == AUTO else plan.name
    if key is None or not of_group:
        return torch.ops.maco.linear_all_reduce(x, weight, bias, residual, of_group, name)
    result, call = first_call(x, weight, bias, residual, of_group, name)
    if call is not None:
        states.of(group, x.device).calls.keep(key, call)
    return result


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


def eager(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    group_name: str,
    plan: str,
) -> torch.Tensor:
    """`linear_all_reduce` with the group and the plan by their names ("" for a group of one)."""
    return first_call(x, weight, bias, residual, group_name, plan)[0]


operator = custom_op("linear_all_reduce", fake)(eager)


def first_call(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    group_name: str,
    plan: str,
) -> tuple[torch.Tensor, Call | None]:
    """The result, and what later calls like this one need not find out; None where there is nothing of the kind."""
    shape = result_shape(x, weight, bias, residual)
    chosen = LinearPlan() if plan == AUTO else parsed(plan)
    if chosen.backend:
        backend(chosen.backend)  # a wrong name is an error on a single rank, too
    if not group_name:
        product = torch.nn.functional.linear(x, weight, bias)
        return product if residual is None else product.add_(residual), None
    group = _resolve_process_group(group_name)
    if plan != AUTO or not math.prod(shape):
        return execute(chosen, x, weight, bias, residual, group)
    require_device(x.device, group)
    about = math.prod(shape[:-1]), weight, (bias is not None, residual is not None)
    planner = planner_of(group, x.device)
    chosen = planner.plan(*about)
    result, call = execute(chosen, x, weight, bias, residual, group)
    planner.ran(chosen, *about)
    return result, call
