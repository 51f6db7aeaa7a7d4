"""Run `linear_all_reduce` by a given plan: no choice is made here."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from maco_lib import state as states
from maco_lib.comm import DTYPES
from maco_lib.linear.plan import LinearPlan, technique
from maco_lib.linear.techniques import sequential, techniques
from maco_lib.linear.techniques.problem import Problem, flattened
from maco_lib.overlap.plan import DEFAULT_BACKEND
from maco_lib.overlap.validation import device_kinds, unavailable
from maco_lib.state import State
from maco_lib.turns import capturing

techniques()  # imports them all now, not while torch.compile traces a call


@dataclass(frozen=True)
class Call:
    """What is known of a call once one like it has run: the shape of its result, its plan with the backend's name.

    direct: all of it, where nothing but a matmul and a sum is needed.
    """

    shape: tuple[int, ...]
    plan: LinearPlan
    backend_name: str
    direct: Callable[..., torch.Tensor] | None = None

    def run(
        self,
        state: State,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        """The call. Collective."""
        state.turns.check()
        if self.direct is not None:
            return self.direct(x, weight, bias, residual)
        result = x.new_empty(self.shape)
        operands = flattened(x), weight, bias, residual if residual is None else flattened(residual), flattened(result)
        technique(self.plan.technique).run(Problem(*operands, self.backend_name, state.group), self.plan)
        return result


def execute(
    plan: LinearPlan,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    group: dist.ProcessGroup,
) -> tuple[torch.Tensor, Call | None]:
    """The result by `plan`, and what later calls like this one need not find out; None where there is nothing of the
    kind. ValueError on what does not fit, and on a plan that cannot be followed here. Collective."""
    shape = result_shape(x, weight, bias, residual)
    name = usable_backend(plan.backend, x.device, group)
    if not math.prod(shape):
        return x.new_empty(shape), None
    state, direct = states.of(group, x.device), None
    if plan.technique == "sequential":
        direct = sequential.bound(state, name, shape, x.dtype)
    call = Call(shape, plan, name, direct)
    return call.run(state, x, weight, bias, residual), None if capturing(x.device) else call


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
    require_device(device, group)
    name = name or DEFAULT_BACKEND[device.type]
    if why := unavailable(name, device, group):
        raise ValueError(f"plan with backend {name!r}: {why}")
    return name


def require_device(device: torch.device, group: dist.ProcessGroup) -> None:
    """ValueError where the group does not work on the device."""
    kinds = device_kinds(group)
    if device.type not in kinds:
        where = " or ".join(kinds)
        raise ValueError(f"x is on {device}, but the {dist.get_backend(group)} group works on {where}")
