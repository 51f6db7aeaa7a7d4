"""Plans: the ways to run a computation and an all-reduce, which of them to try, and which of those tried to keep.

Without torch: `execute` runs a plan, `search` says which are timed, `planner` times them.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

P = TypeVar("P")
DEFAULT_BACKEND = {"cpu": "gloo", "cuda": "nccl"}
# A plan replaces a simpler one if it is faster by more than this, as in `stats.verdict`.
MARGIN = 0.01
# One that does not lead, by more than this: where the streams have just joined, either side may begin first then, and
# calls back to back take up to 1.25 times as long as behind another kernel (2 H200s, docs/tried.md).
ASIDE_MARGIN = 0.03


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


def captured(plans: Iterable[Plan]) -> list[Plan]:
    """What else is worth a measurement where a CUDA graph is replayed: those that lead, with the roles exchanged.

    There a side stream begins on time, and either may be the faster; in eager code it is late (table `overlap_eager`).
    """
    return [replace(plan, leads=False, urgent=True) for plan in plans if plan.leads]


def choose(measured: Mapping[Plan, float], kind: str, aside_margin: float = ASIDE_MARGIN) -> Plan:
    """The plan to keep: overlapped, and with SMs reserved, only where that is faster by more than `MARGIN`; not leading
    only where that is faster by more than `aside_margin`: in graphs, where side streams begin on time, `MARGIN`.

    `measured`: time of each, among them `sequential(kind)`; NaN or inf for one that could not be measured.
    """
    aside = {plan for plan in measured if plan.overlapped and not plan.leads and kind == "cuda"}
    kept = keep(
        {plan: us for plan, us in measured.items() if plan not in aside},
        sequential(kind),
        lambda plan: (plan.overlapped, plan.leaves > 0),
    )
    rivals = {plan: measured[plan] * (1 - MARGIN) / (1 - aside_margin) for plan in aside}
    return keep({kept: measured[kept], **rivals}, kept, lambda plan: plan.leaves > 0)


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
    """How a plan was chosen for one key.

    measured_us: times in µs of the slowest rank, of the plans that were compared last. how: "calls" (on the user's own
    calls), "tune", or why nothing was measured. chosen: None while calls are measured. captured: what captured code
    follows instead, where `tune`, which measures replays, found it.
    """

    key: str
    num_bytes: int
    dtype: str
    num_ranks: int
    how: str
    measured_us: dict[Plan, float] = field(default_factory=dict)
    chosen: Plan | None = None
    captured: Plan | None = None


_DECISIONS: list[Decision] = []


def record(decision: Decision) -> Decision:
    """Add to what `decisions()` tells."""
    _DECISIONS.append(decision)
    return decision


def decisions() -> list[Decision]:
    """Every decision of this process, in the order in which they were begun."""
    return list(_DECISIONS)
