"""`plan="auto"` of `linear_all_reduce`: a plan for every (M, N, K), measured by `tune_linear` or looked up.

How the plan of a call is found, the same on every rank:

    tuned       M was tuned: its plan. Between or beside tuned Ms that differ from M by a factor of 2 at most, of those
                whose plans are for M: the nearest one's, the nearest sequential one's if any of them is sequential.
    table       elsewhere: by times that were measured on GPUs of this model, in this number (`linear.lookup`).
    default     matmul, then NCCL or gloo: where there is no such table or it has nothing that is sure to be faster,
                where K differs between the ranks, and while a graph is captured if no call of the same kind has run
                with the plan before.

Nothing is timed in the user's calls. The first one for a weight's shape compares K between the ranks. All decisions are
told by `overlap.decisions()`, what is looked up once for each plan that a weight's shape takes.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from maco_lib import comm
from maco_lib import state as states
from maco_lib.comm import DTYPES
from maco_lib.host import short_gpu_name
from maco_lib.linear.lookup import PlanTable, shipped
from maco_lib.linear.measure import Shape
from maco_lib.linear.plan import LinearPlan, candidates, technique
from maco_lib.linear.techniques.problem import workspace_address
from maco_lib.overlap.plan import DEFAULT_BACKEND, Decision, keep, record
from maco_lib.overlap.validation import check_agreement, device_kinds, group_name, row_counts
from maco_lib.state import State
from maco_lib.timing import gather

# Calls that a capture can rely on, and plans that were looked up; beyond, the oldest are forgotten, so that changing
# shapes take no more memory.
MAX_PREPARED = 4096
TABLE_DTYPES = (torch.bfloat16, torch.float16)  # that shipped tables are for


@dataclass
class LinearDecision(Decision):
    """How the plan for (num_rows, n, k) was chosen. how: "tune", "table", "default" or "captured unprepared".

    gain: how many times as fast as the default the plan was where the table has it; NaN where there is none.
    t_comp_us: of the matmul alone, where it was tuned.
    """

    num_rows: int = 0
    n: int = 0
    k: int = 0
    gain: float = math.nan
    t_comp_us: float = math.nan


@dataclass
class Layer:
    """What is decided for weights (n, k) of one type. k: the largest of the ranks'; even: whether all are the same.

    tuned, unprepared: decisions by number of rows. looked_up: plans by number of rows; said: those of them recorded.
    """

    n: int
    k: int
    dtype: torch.dtype
    even: bool
    tuned: dict[int, LinearDecision] = field(default_factory=dict)
    looked_up: dict[int, LinearPlan] = field(default_factory=dict)
    said: set[LinearPlan] = field(default_factory=set)
    unprepared: dict[int, LinearDecision] = field(default_factory=dict)


def nearby(tuned: Mapping[int, LinearPlan], num_rows: int) -> LinearPlan | None:
    """The plan for `num_rows`, not tuned itself, by those that are (see this module); None if none is that near."""
    tuned = {m: plan for m, plan in tuned.items() if plan.covers(num_rows)}
    below = max((m for m in tuned if m < num_rows <= 2 * m), default=None)
    above = min((m for m in tuned if num_rows < m <= 2 * num_rows), default=None)
    sides = sorted((m for m in (below, above) if m), key=lambda m: abs(math.log(m / num_rows)))
    sequential = [m for m in sides if not tuned[m].overlapped]
    return next((tuned[m] for m in (*sequential, *sides)), None)


class LinearPlanner:
    """The layers of one group on one device."""

    def __init__(self, state: State):
        self.state, self.device = state, state.device
        self.default = LinearPlan(backend=DEFAULT_BACKEND[self.device.type])
        self.backends: list[str] = []  # that every rank has
        self.table: PlanTable | None = None
        self.layers: dict[tuple[int, int, torch.dtype], Layer] = {}
        self.prepared: dict[tuple, None] = {}
        self.workspace = 0

    @property
    def group(self) -> dist.ProcessGroup:
        return self.state.group

    def layer(self, weight: torch.Tensor) -> Layer:
        """What is known of weights of this shape. Collective when it is the first of its shape."""
        (n, k), dtype = weight.shape, weight.dtype
        if (n, k, dtype) not in self.layers:
            if not self.backends:
                self.meet()
            every_k = gather(k, self.group)
            self.layers[n, k, dtype] = Layer(n, max(every_k), dtype, len(set(every_k)) == 1)
        return self.layers[n, k, dtype]

    def meet(self) -> None:
        """Find out what all ranks have in common. Collective."""
        gpu = short_gpu_name(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else ""
        mine = comm.available("all_reduce", self.device, self.group)
        gpus, everyones = zip(*gather((gpu, mine), self.group), strict=True)
        self.backends = [name for name in mine if all(name in theirs for theirs in everyones)]
        self.table = shipped(gpu, self.group.size()) if gpu and len(set(gpus)) == 1 else None

    def plans(self, layer: Layer, num_rows: int) -> list[LinearPlan]:
        """The candidates for so many rows that have kernels for them."""
        every = candidates(self.device.type, self.backends)
        num_bytes = num_rows * layer.n * layer.dtype.itemsize
        return [
            plan
            for plan in every
            if plan.covers(num_rows)
            and (not plan.backend or sums(plan.backend, layer.dtype, num_bytes))
            and technique(plan.technique).suits(layer, self.backends)
        ]

    def decide(self, layer: Layer, num_rows: int, how: str) -> LinearDecision:
        """A decision to be completed; recorded."""
        key = f"linear_all_reduce of ({num_rows}, {layer.k}) x ({layer.n}, {layer.k})"
        num_bytes, dtype = num_rows * layer.n * layer.dtype.itemsize, str(layer.dtype)
        place = {"num_rows": num_rows, "n": layer.n, "k": layer.k}
        return record(LinearDecision(key, num_bytes, dtype, self.group.size(), how, chosen=self.default, **place))

    def look_up(self, layer: Layer, num_rows: int) -> LinearPlan:
        """The table's plan for so many rows, or the default."""
        if num_rows not in layer.looked_up:
            chosen, gain = self.default, math.nan
            if self.table is not None and layer.even and layer.dtype in TABLE_DTYPES:
                # Without a tiling, as the table has it.
                usable = {replace(plan, tiling="") for plan in self.plans(layer, num_rows)}
                found = self.table.look_up(num_rows, layer.n, layer.k, usable.__contains__)
                chosen, gain = (found.plan, found.gain) if found.plan else (self.default, math.nan)
            layer.looked_up[num_rows] = chosen
            if len(layer.looked_up) > MAX_PREPARED:
                del layer.looked_up[next(iter(layer.looked_up))]
            if chosen not in layer.said:
                layer.said.add(chosen)
                decision = self.decide(layer, num_rows, "table" if chosen != self.default else "default")
                decision.chosen, decision.gain = chosen, gain
        return layer.looked_up[num_rows]

    def plan(self, num_rows: int, weight: torch.Tensor, operands: tuple[bool, ...]) -> LinearPlan:
        """The plan of a call; operands: whether it has a bias and a residual. Collective as `layer`."""
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing and (*weight.shape, weight.dtype) not in self.layers:
            warn_unprepared(num_rows, weight, self.default)
            return self.default
        layer = self.layer(weight)
        if num_rows in layer.tuned:
            chosen = layer.tuned[num_rows].chosen
        else:
            chosen = nearby({m: decision.chosen for m, decision in layer.tuned.items()}, num_rows)
            chosen = chosen or self.look_up(layer, num_rows)
        if not capturing or chosen == self.default or self.is_prepared(chosen, num_rows, weight, operands):
            return chosen
        if num_rows not in layer.unprepared:
            warn_unprepared(num_rows, weight, self.default)
            layer.unprepared[num_rows] = self.decide(layer, num_rows, "captured unprepared")
        return self.default

    def is_prepared(self, plan: LinearPlan, num_rows: int, weight: torch.Tensor, operands: tuple[bool, ...]) -> bool:
        """Whether a call that has run needed all that this one needs: kernels, buffers, tables."""
        self.forget_old_workspace()
        return (plan, num_rows, *weight.shape, weight.dtype, *operands) in self.prepared

    def ran(self, plan: LinearPlan, num_rows: int, weight: torch.Tensor, operands: tuple[bool, ...]) -> None:
        """Remember that a call was issued, so that one like it can be captured."""
        self.forget_old_workspace()
        self.prepared[plan, num_rows, *weight.shape, weight.dtype, *operands] = None
        if len(self.prepared) > MAX_PREPARED:
            del self.prepared[next(iter(self.prepared))]

    def forget_old_workspace(self) -> None:
        """A workspace that has grown is another buffer, which a backend may have to be told of."""
        address = workspace_address(self.device, self.group)
        if address != self.workspace:
            self.workspace = address
            self.prepared.clear()

    def tune(self, layer: Layer, num_rows: int, weight: torch.Tensor, budget_s: float) -> LinearDecision:
        """`tune_linear` for one M. Collective."""
        decision = self.decide(layer, num_rows, "tune")
        shape, plans = Shape(num_rows, weight, self.group), self.plans(layer, num_rows)
        plans = list(dict.fromkeys([self.default, *plans]))
        faults = {plan: shape.fault(plan) for plan in plans if plan != self.default}
        usable = [plan for plan in plans if not faults.get(plan)]
        decision.t_comp_us, times_us = shape.times_us(usable, budget_s=budget_s, min_iterations=10)
        decision.measured_us = {plan: times_us.get(plan, math.inf) for plan in plans}
        decision.chosen = keep(decision.measured_us, self.default)
        for plan in usable:
            self.ran(plan, num_rows, weight, (False, False))
        layer.tuned[num_rows] = decision
        self.state.calls.clear()  # which may have another plan from now on
        return decision


def sums(backend_name: str, dtype: torch.dtype, num_bytes: int) -> bool:
    """Whether the backend has kernels for a result of that type and size."""
    backend = comm.backend(backend_name)
    try:
        if hasattr(backend, "require"):
            backend.require("all_reduce", dtype)
        if hasattr(backend, "require_size"):
            backend.require_size(num_bytes)
    except ValueError:
        return False
    return True


def warn_unprepared(num_rows: int, weight: torch.Tensor, default: LinearPlan) -> None:
    warnings.warn(
        f"linear_all_reduce of {num_rows} rows with a weight of {tuple(weight.shape)} is captured with the plan "
        f"{default}: run it once before the capture, with the same shapes, for plan='auto' to choose",
        stacklevel=2,
    )


def planner(group: dist.ProcessGroup, device: torch.device) -> LinearPlanner:
    """The planner of a group on this rank's device; it lives as long as the group."""
    return states.of(group, device).get(LinearPlanner)


def tune_linear(
    weight: torch.Tensor,
    num_rows: Iterable[int],
    group: dist.ProcessGroup | None = None,
    *,
    budget_s: float = 0.1,
) -> dict[int, LinearDecision]:
    """Measure every plan for weights like `weight`, and keep the fastest of each M for plan="auto". Collective.

    weight: (N, K), this rank's share, of the type that x will have. num_rows: the Ms, the same on every rank; what is
    between them follows from them (see this module). budget_s: seconds for each M beyond warm-up, about a second on
    GPUs, and some for every kernel that the process has yet to compile. An overlapping plan is kept where it is
    faster than the fastest sequential one by more than 1 %. Random x, no bias, no residual; the weights are as cold as
    a model's. For a group of one there is nothing to choose: {}.

    Returns the decision for each M. Raises ValueError, on every rank, on a weight or Ms that are not valid on one of
    them, or differ between ranks.
    """
    rows = list(num_rows) if isinstance(num_rows, Iterable) else num_rows  # one that can be iterated twice
    check_agreement(lambda: described(weight, rows, group), group)
    described(weight, rows, group)  # also where there is nobody to agree with
    if not group_name(group, "tune_linear"):
        return {}
    group = group or dist.group.WORLD
    with torch.no_grad():
        owner = planner(group, weight.device)
        layer = owner.layer(weight)
        # The largest first, for which the buffers of all are made.
        decided = {
            m: owner.tune(layer, m, weight.detach(), budget_s)
            for m in sorted(set(row_counts(rows, "tune_linear")), reverse=True)
        }
    return dict(sorted(decided.items()))


def described(weight: torch.Tensor, num_rows: Iterable[int], group: dist.ProcessGroup | None) -> str:
    """What `tune_linear` needs to be the same on every rank, in words; raises ValueError where this one refuses it."""
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.dtype not in DTYPES.values():
        got = f"{tuple(weight.shape)} {weight.dtype}" if isinstance(weight, torch.Tensor) else repr(weight)
        raise ValueError(f"weight = {got} is not a tensor (N, K) of {', '.join(map(str, DTYPES.values()))}")
    counts = row_counts(num_rows, "tune_linear")
    if not weight.numel():
        raise ValueError(f"weight of {tuple(weight.shape)} has no elements")
    if group_name(group, "tune_linear") and weight.device.type not in device_kinds(group):
        raise ValueError(f"weight is on {weight.device}, but the {dist.get_backend(group)} group is not")
    return f"tune_linear of {sorted(set(counts))} rows with N = {weight.shape[0]}, {weight.dtype}"
