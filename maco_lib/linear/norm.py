"""`linear_all_reduce_norm`: a row-parallel linear layer up to the next layer's input, as one operation.

    normed, residual = linear_all_reduce_norm(x, weight, residual, norm_weight)

Matmul, all-reduce, residual addition and RMSNorm. At the sizes of decoding the last three are one kernel
(`kernels.sum_norm`), where every launch, and every wait for the other ranks, counts; of the fewest rows the matmul is
ours too (`kernels.decode`), and sends its product itself. It is the custom operator
`maco::linear_all_reduce_norm`, so torch.compile keeps it whole. Under a CUDA graph: run it once before the capture with
the same shapes; buffers and kernels are made then, by all ranks together.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from maco_lib import state as states
from maco_lib.comm import backend
from maco_lib.comm.mailbox import Mailbox
from maco_lib.comm.symmetric import ALIGNMENT
from maco_lib.kernels.inbox import LINE_DATA, has_room
from maco_lib.linear import op
from maco_lib.linear.custom_op import custom_op
from maco_lib.linear.execute import Call as LinearCall
from maco_lib.linear.execute import result_shape, usable_backend
from maco_lib.linear.plan import LinearPlan
from maco_lib.linear.techniques.decode import in_whole_lines, unsuited
from maco_lib.linear.techniques.problem import flattened
from maco_lib.overlap import calls
from maco_lib.overlap.validation import check_agreement, group_name, require_operands, unavailable
from maco_lib.turns import capturing

MAX_ROWS = 256
# What has to be usable for its kernel.
SUM = "maco_ll128"
# What the ways of the sum are chosen by: the second way over NVLink, and what all SMs together write to the peers, of
# which lines are twice the data, long lines 16 / 15 of it.
WAY_US, BYTES_PER_US, IN_LINES, IN_LONG_LINES = 1.0, 350e3, 2.0, 16 / 15
# What is saved where the matmul itself sends its product, in lines: a launch, and the way through memory.
SENT_US = 3.0


class Operands(NamedTuple):
    """The tensors of a call, as of `linear_all_reduce_norm`."""

    x: torch.Tensor
    weight: torch.Tensor
    residual: torch.Tensor
    norm_weight: torch.Tensor
    bias: torch.Tensor | None


def linear_all_reduce_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float = 1e-6,
    bias: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    plan: LinearPlan | str = "auto",
    *,
    check: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, residual_out): residual_out = residual + the sum over the ranks of x @ weight.T, + bias once;
    normed = residual_out / sqrt(mean of its squares along N + eps) * norm_weight. Every rank of the group calls it.

    x: (..., K), bf16, fp16, fp32 or fp64; weight: (N, K), K being this rank's share; residual: (..., N);
    norm_weight, bias: (N,). All but x and weight are the same on every rank; all are of x's type and on its device.
    group: None for all ranks; of one rank, or no process group at all: the plain layer and norm.
    plan: "fused": one kernel after the matmul; for bf16, fp16 and fp32, up to 256 rows, on Hopper GPUs with NVLink. (Up
    to 64 rows it may copy a weight whose rows do not begin at multiples of 16 bytes, each time.)
    A `LinearPlan`: `linear_all_reduce` by it, then residual and norm. "auto": "fused" where it can be, else
    `linear_all_reduce` as it is by default.
    check: first compare shape, type and plan across the ranks (blocks the host; not for captured or compiled code).

    Returns two new tensors (..., N) of x's type; the same bits on every rank, and every time for the same input and
    plan. In float32 but for what is rounded: each rank's product, residual_out, from which normed is computed as it is
    returned, and normed. For inference: there is no backward.

    Raises ValueError on shapes, types or devices that do not fit each other or the group, on inputs that require
    gradients, and on a plan that cannot be followed here: here alone, but with `check` on every rank, and there also
    when the ranks disagree.
    """
    operands = Operands(x, weight, residual, norm_weight, bias)
    key = None if check else calls.key_of("norm", plan, *operands)
    if known := calls.found(x, group, key):
        state, call = known
        return call.run(state, operands, eps)
    if check:
        check_agreement(lambda: described(operands, eps, group, plan), group)
    of_group, name = require_call(operands, group, plan), plan if isinstance(plan, str) else plan.name
    if key is None or not of_group:
        return torch.ops.maco.linear_all_reduce_norm(x, weight, residual, norm_weight, eps, bias, of_group, name)
    results, call = first_call(operands, eps, of_group, name)
    if call is not None:
        states.of(group, x.device).calls.keep(key, call)
    return results


def require_call(operands: Operands, group: dist.ProcessGroup | None, plan: LinearPlan | str) -> str:
    """The name of the group for `operator`; ValueError on what it cannot be called with."""
    require_operands(operands._asdict(), ("bias",), "linear_all_reduce_norm")
    if not isinstance(plan, LinearPlan) and plan not in ("auto", "fused"):
        raise ValueError(f"plan = {plan!r} is not a LinearPlan, 'auto' or 'fused'")
    return group_name(group, "linear_all_reduce_norm")


def described(operands: Operands, eps: float, group: dist.ProcessGroup | None, plan: LinearPlan | str) -> str:
    """What is to be the same on every rank, in words; raises ValueError where this one refuses the call."""
    require_call(operands, group, plan)
    shape, x = norm_shape(operands), operands.x
    group = group or dist.group.WORLD
    usable_backend("" if isinstance(plan, str) else plan.backend, x.device, group)
    if plan == "fused" and (why := unfusable(x, operands.weight, group)):
        raise ValueError(f"plan = 'fused': {why}")
    given = f"{eps}, {'no ' if operands.bias is None else ''}bias; {plan}"
    return f"linear_all_reduce_norm({given}) of {shape} {x.dtype}"


def fake(x, weight, residual, norm_weight, eps, bias, group_name, plan):
    shape = norm_shape(Operands(x, weight, residual, norm_weight, bias))
    return x.new_empty(shape), x.new_empty(shape)


@dataclass(frozen=True)
class Call:
    """What is known of a call once one like it has run: the shape of its results, and how the sum is made: by `linear`,
    None where it is fused: with a matmul that sends its product or, where `in_memory` is no None, one-shot or not."""

    shape: tuple[int, ...]
    linear: LinearCall | None
    in_memory: bool | None = None

    def run(self, state: states.State, operands: Operands, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The call. Collective."""
        state.turns.check()
        x, weight, residual, norm_weight, bias = operands
        rows, old = flattened(x), flattened(residual)
        if self.linear is None:
            normed, total = fused(Operands(rows, weight, old, norm_weight, bias), eps, state, self.in_memory)
        else:
            normed, total = add_norm(self.linear.run(state, rows, weight, bias, None), old, norm_weight, eps)
        if len(self.shape) == 2:
            return normed, total
        return normed.view(self.shape), total.view(self.shape)


def eager(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    bias: torch.Tensor | None,
    group_name: str,
    plan: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_all_reduce_norm` with the group and the plan by their names ("" for a group of one)."""
    return first_call(Operands(x, weight, residual, norm_weight, bias), eps, group_name, plan)[0]


operator = custom_op("linear_all_reduce_norm", fake)(eager)


def first_call(
    operands: Operands, eps: float, group_name: str, plan: str
) -> tuple[tuple[torch.Tensor, torch.Tensor], Call | None]:
    """The results, and what later calls like this one need not find out; None where there is nothing of the kind."""
    x, weight, residual, norm_weight, bias = operands
    shape = norm_shape(operands)
    group = _resolve_process_group(group_name) if group_name else None
    if group is not None:
        usable_backend("", x.device, group)
    why = unfusable(x, weight, group)
    if plan == "fused" and why:
        raise ValueError(f"plan = 'fused': {why}")
    if plan in ("auto", "fused") and not why:
        rows, num_ranks, in_memory = flattened(x), group.size(), None
        if not sends(rows, weight, num_ranks):
            in_memory = fastest_way(len(rows), len(weight) * x.itemsize, num_ranks)
        call = Call(shape, None, in_memory)
        results = call.run(states.of(group, x.device), operands, eps)
        return results, None if capturing(x.device) else call
    product, of_linear = op.first_call(flattened(x), weight, bias, None, group_name, plan)
    normed, total = add_norm(product, flattened(residual), norm_weight, eps)
    return (normed.view(shape), total.view(shape)), None if of_linear is None else Call(shape, of_linear)


def norm_shape(operands: Operands) -> tuple[int, ...]:
    """The shape of both results; ValueError naming what does not fit."""
    x, weight, residual, norm_weight, bias = operands
    shape = result_shape(x, weight, bias, residual)
    if tuple(norm_weight.shape) != shape[-1:]:
        raise ValueError(f"norm_weight has shape {tuple(norm_weight.shape)} instead of {shape[-1:]}")
    if norm_weight.dtype != x.dtype:
        raise ValueError(f"norm_weight is of {norm_weight.dtype} instead of x's {x.dtype}")
    if norm_weight.device != x.device:
        raise ValueError(f"norm_weight is on {norm_weight.device} instead of x's {x.device}")
    return shape


def unfusable(x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup | None) -> str:
    """Why the kernel cannot do what follows the matmul, or ""; the same on every rank."""
    if group is None:
        return "a single rank has nothing to sum"
    if why := unavailable(SUM, x.device, group):
        return why
    if x.dtype not in backend(SUM).dtypes:
        return f"it is for {', '.join(map(str, backend(SUM).dtypes))}, not {x.dtype}"
    num_rows = math.prod(x.shape[:-1])  # K may be 0 on some ranks
    num_columns = weight.shape[0]
    if num_rows < 1 or num_columns < 1:
        return "there is nothing to sum"
    if num_columns * x.itemsize % 8:
        return f"N = {num_columns} of {x.dtype} is no whole number of 8 bytes"
    if fastest_way(num_rows, num_columns * x.itemsize, group.size()) is None:
        return f"{num_rows} rows of {num_columns} are more than it has room for"
    return ""


def ways(num_rows: int, row_bytes: int, num_ranks: int) -> dict[bool, float]:
    """One-shot (True) and two-shot, those that have room, in us by bytes moved and ways."""
    others, long_bytes = num_ranks - 1, num_rows * row_bytes * IN_LONG_LINES
    copies = {True: 1.0, False: 2 * -(-num_rows // num_ranks) / num_rows}
    return {
        one_shot: others * copies[one_shot] * long_bytes / BYTES_PER_US + (0.0 if one_shot else WAY_US)
        for one_shot in copies
        if num_rows <= MAX_ROWS and has_room(num_rows, row_bytes // LINE_DATA, num_ranks, one_shot)
    }


def fastest_way(num_rows: int, row_bytes: int, num_ranks: int) -> bool | None:
    """Whether the sum is one-shot; None: there is no room either way."""
    times = ways(num_rows, row_bytes, num_ranks)
    return min(times, key=lambda way: times[way], default=None)


def sends(x: torch.Tensor, weight: torch.Tensor, num_ranks: int) -> bool:
    """Whether the matmul is to send its product itself, one-shot in lines; the same on every rank."""
    num_rows, row_bytes = len(x), len(weight) * x.itemsize
    if unsuited(num_rows, len(weight), x.dtype, x.device, num_ranks):
        return False
    in_lines = (num_ranks - 1) * num_rows * row_bytes * IN_LINES / BYTES_PER_US
    return in_lines - SENT_US <= min(ways(num_rows, row_bytes, num_ranks).values(), default=math.inf)


def fused(
    operands: Operands, eps: float, state: states.State, one_shot: bool | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, residual_out), of x (M, K) and residual (M, N), by a matmul and one kernel. Collective.

    one_shot: of a sum of products in memory; None: the matmul is to send its own.
    """
    from maco_lib.kernels.sum_norm import sum_norm

    x, weight, residual, norm_weight, bias = operands
    box = state.get(Mailbox).box
    own_bias = bias.contiguous() if bias is not None and box.rank == 0 else None
    product = None
    if one_shot is None:
        from maco_lib.kernels.decode import decode

        x, weight = in_whole_lines(x), in_whole_lines(weight)
        state.turns.take()
        decode(x, weight, own_bias, box)
    else:
        product = torch.nn.functional.linear(x, weight, own_bias)
        state.turns.take()
    both = sum_norm(product, aligned(residual), aligned(norm_weight), eps, box, one_shot=bool(one_shot))
    state.turns.give()
    return both


def add_norm(
    total: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, total + residual) of (M, N): what `fused` does after the sum, on this rank alone."""
    if total.device.type == "cuda" and total.numel() and total.dtype in backend(SUM).dtypes:
        from maco_lib.kernels.add_rms_norm import add_rms_norm

        launches = states.on(total.device).launches
        return add_rms_norm(total, aligned(residual), aligned(weight), eps, launches)
    wide = torch.promote_types(total.dtype, torch.float32)
    total = (total.to(wide) + residual.to(wide)).to(total.dtype)
    values = total.to(wide)
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return (values * scale * weight.to(wide)).to(total.dtype), total


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the kernels read it: contiguous, at a multiple of 16; a copy where it is not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
