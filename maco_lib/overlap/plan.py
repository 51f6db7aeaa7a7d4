"""Plans: the ways to run a computation and an all-reduce, which of them to try, and which of those tried to keep.

Without torch: `execute` runs a plan, `calibration` predicts its time, `planner` measures it.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

P = TypeVar("P")
DEFAULT_BACKEND = {"cpu": "gloo", "cuda": "nccl"}
# What a user's work is tried with before one plan is kept: each costs a few calls.
MAX_CANDIDATES = 8
# Backends that hold more SMs, or for longer, than a matmul that does not know of it can do without: also tried with as
# many left to them.
LEFT_TO = {"maco_pull_8": 8, "maco_staged_12": 12}
# A plan replaces a simpler one if it is faster by more than this, as in `stats.verdict`.
MARGIN = 0.01


@dataclass(frozen=True)
class Plan:
    """A way to run a computation and an all-reduce.

    backend: of `maco_lib.comm.BACKENDS`, which also decides how many SMs the all-reduce takes; "": the device's default
    (NCCL or gloo). overlapped: side by side, else the all-reduce and then the computation. urgent: on a side stream of
    the highest priority (GPUs). compute_first: the computation is issued first, so that it is first to get SMs. leads:
    the all-reduce keeps the current stream and the computation moves to a side stream, so that the all-reduce is first
    to get SMs even where the GPU has work queued; a side stream begins some µs later than the stream it waits for
    (table `overlap_eager`). leaves: so many SMs are left alone by the computation's matmuls (`sm_limit`).
    Raises ValueError if both are to be first, and on `leaves` below 0 or where nothing overlaps.
    """

    backend: str = ""
    overlapped: bool = True
    urgent: bool = True
    compute_first: bool = False
    leads: bool = False
    leaves: int = 0

    def __post_init__(self) -> None:
        if self.leaves < 0 or self.leaves and not self.overlapped:
            raise ValueError(f"leaves = {self.leaves} in {self}: it is a number of SMs, for overlapped plans")
        if self.leads and (self.compute_first or not self.overlapped):
            raise ValueError(f"leads = True in {self}: it is for overlapped plans without compute_first")

    def on(self, kind: str) -> "Plan":
        """The same with everything said, for a `kind` of device ("cpu" or "cuda"); a CPU has no urgent streams."""
        return replace(
            self,
            backend=self.backend or DEFAULT_BACKEND[kind],
            urgent=self.urgent and kind == "cuda",
            leads=self.leads and kind == "cuda",
            leaves=self.leaves if kind == "cuda" else 0,
        )

    def __str__(self) -> str:
        """Its parts: "maco_push_64, overlapped, urgent"."""
        words = [self.backend or "default backend", "overlapped" if self.overlapped else "sequential"]
        if self.overlapped:
            words += ["urgent"] * self.urgent + ["computation first"] * self.compute_first + ["leading"] * self.leads
            words += [f"leaving {self.leaves} SMs"] * bool(self.leaves)
        return ", ".join(words)


def sequential(kind: str) -> Plan:
    """What everything is judged against: the default collective, then the computation."""
    return Plan(overlapped=False).on(kind)


def overlapping(kind: str, backends: Iterable[str]) -> list[Plan]:
    """The overlapping plans that are calibrated on a `kind` of device with these backends."""
    plans = [Plan(backend, urgent=False, leads=True).on(kind) for backend in backends]
    if kind == "cuda":
        plans += [replace(plan, leaves=LEFT_TO[plan.backend]) for plan in plans if plan.backend in LEFT_TO]
        # What order and priority do is shown by the default collective; the SMs go to whoever comes first.
        plans += [Plan(DEFAULT_BACKEND[kind], compute_first=True), Plan(DEFAULT_BACKEND[kind])]
    return plans


def shortlist(predicted: Mapping[Plan, float], kind: str) -> list[Plan]:
    """The plans worth a measurement, at most `MAX_CANDIDATES`: `predicted` has the time of each.

    The default sequential one, the best other sequential one, then the best overlapping ones, one of each backend and
    number of SMs left to it.
    """
    by_time = sorted(predicted, key=lambda plan: (predicted[plan], str(plan)))
    best_sequential = next(plan for plan in by_time if not plan.overlapped)
    chosen = list(dict.fromkeys([sequential(kind), best_sequential]))
    of_backend: dict[tuple[str, int], Plan] = {}
    for plan in by_time:
        if plan.overlapped:
            of_backend.setdefault((plan.backend, plan.leaves), plan)
    return [*chosen, *of_backend.values()][:MAX_CANDIDATES]


def captured(plans: Iterable[Plan]) -> list[Plan]:
    """What else is worth a measurement where a CUDA graph is replayed: those that lead, with the roles exchanged.

    There a side stream begins on time, and either may be the faster; in eager code it is late (table `overlap_eager`).
    """
    return [replace(plan, leads=False, urgent=True) for plan in plans if plan.leads]


def choose(measured: Mapping[Plan, float], kind: str) -> Plan:
    """The plan to keep: overlapped only where that beats the best sequential one by more than `MARGIN`, and not leading
    only where that beats the best leading one by more: without a graph it mostly takes longer (table `overlap_eager`).

    `measured`: time of each, among them `sequential(kind)`; NaN or inf for one that could not be measured.
    """
    return keep(measured, sequential(kind), lambda plan: (plan.overlapped, not plan.leads))


def keep(measured: Mapping[P, float], kept: P, rank_of: Callable[[P], Any] = lambda plan: plan.overlapped) -> P:
    """Rank by rank, the fastest plan replaces what was kept so far where it is faster by more than `MARGIN`.

    kept: the default, of the lowest rank.
    """
    for rank in sorted(set(map(rank_of, measured))):
        rivals = [plan for plan in measured if rank_of(plan) == rank and math.isfinite(measured[plan])]
        best = min(rivals, key=lambda plan: (measured[plan], str(plan)), default=kept)
        if measured[best] < (1 - MARGIN) * measured[kept] or not math.isfinite(measured[kept]):
            kept = best
    return kept


@dataclass
class Decision:
    """How a plan was chosen for one key; times in µs of the slowest rank.

    predicted_us: by the model, of every candidate; measured_us: of those measured so far. how: "calls" (on the user's
    own calls), "tune", or "predicted" (nothing measured: under graph capture, and by `linear_all_reduce` where it was
    not tuned). chosen: None while calls are measured. captured: what captured code follows instead, where `tune`, which
    measures replays, found it.
    """

    key: str
    num_bytes: int
    dtype: str
    num_ranks: int
    how: str
    t_comp_us: float = math.nan
    predicted_us: dict[Plan, float] = field(default_factory=dict)
    measured_us: dict[Plan, float] = field(default_factory=dict)
    chosen: Plan | None = None
    captured: Plan | None = None

    @property
    def error(self) -> float:
        """Predicted / measured - 1 of the chosen plan; NaN where one of them is not known."""
        return self.predicted_us.get(self.chosen, math.nan) / self.measured_us.get(self.chosen, math.nan) - 1


_DECISIONS: list[Decision] = []


def record(decision: Decision) -> Decision:
    """Add to what `decisions()` tells."""
    _DECISIONS.append(decision)
    return decision


def decisions() -> list[Decision]:
    """Every decision of this process, in the order in which they were begun."""
    return list(_DECISIONS)
