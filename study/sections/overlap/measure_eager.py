"""Measure what launching does to overlap: each way replayed from a CUDA graph and issued eagerly, behind queued work.

Eagerly a side stream begins some µs after the stream that it waits for, and what comes first gets the SMs. So each
technique is measured in both roles: the all-reduce on the side stream, and leading (`Plan.leads`), the matmul there.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from maco_lib.overlap.plan import Plan
from maco_lib.timing import Arm, Timing, interleave
from study.harness import stats, worker
from study.harness.worker import Context, Result, samples_of
from study.sections.overlap.measure import planned
from study.sections.overlap.problem import Problem

AUTO = "auto"


def measure(point: dict[str, Any], context: Context) -> Result:
    """A row for each launch mode and way: the point's methods, the overlapping ones leading as well on GPUs."""
    problem, on_gpu = Problem(point, context), context.device.type == "cuda"
    rows, samples = [], []
    for launched in point["launched"].split(","):
        errors: dict[str, str] = {}
        ways = ways_of(problem, point["methods"].split(","), launched, errors)
        timings, arms = {}, usable_arms(problem, ways, errors)
        if arms:
            timings = interleave(
                arms, group=problem.group, device=problem.device, budget_s=point["budget_s"],
                min_iterations=point["min_iterations"], warmup=3 if on_gpu else 1, captured=launched == "graph",
            )  # fmt: skip
        for name in [name for name, timing in timings.items() if launched == "graph" and timing.timing != "graph"]:
            errors[name] = "it could not be captured in a CUDA graph"
            del timings[name]
        for entry in samples_of(timings):
            entry.labels["launched"] = launched
            samples.append(entry)
        rows += [
            row(point, context, launched, name, way.method, way.plan, timings, errors[name])
            for name, way in ways.items()
        ]
    return Result(rows, samples)


@dataclass(frozen=True)
class Way:
    """A method by one plan (None: the planner failed); operation: whose all-reduce it runs, of `Problem.operations`."""

    method: str
    plan: Plan | None
    operation: str


def ways_of(problem: Problem, methods: list[str], launched: str, errors: dict[str, str]) -> dict[str, Way]:
    """The ways by name, with `errors` saying what has no plan. Collective."""
    ways: dict[str, Way] = {}
    for method in methods:
        plan = planned(problem, method, errors)
        operation = plan.backend if plan else ""
        if method == AUTO:
            operation = "auto, eager" if launched == "eager" else "auto"
            plan = plan and problem.tuned[operation]
        ways[method] = Way(method, plan, operation)
        if problem.device.type == "cuda" and plan and plan.overlapped and method != AUTO:
            ways[f"{method}, leading"] = Way(method, replace(plan, urgent=False, leads=True), operation)
    return ways


def usable_arms(problem: Problem, ways: dict[str, Way], errors: dict[str, str]) -> list[Arm]:
    """The arms that gave the right result; `errors` says what was wrong with the others. Collective."""
    arms = []
    for name, way in ways.items():
        errors[name] = errors.get(name, "") or problem.use(way.operation)
        if not errors[name]:
            arm = problem.planned(name, way.plan, way.operation)
            errors[name] = problem.error(arm, way.operation, True)
            arms += [] if errors[name] else [arm]
    return arms


def row(
    point: dict,
    context: Context,
    launched: str,
    name: str,
    method: str,
    plan: Plan | None,
    timings: dict[str, Timing],
    error: str,
) -> dict[str, Any]:
    """The reported row of one way: its time, and its speedup over sequential code launched likewise."""
    mine, reference = timings.get(name), timings.get("sequential")
    ratio = low = high = math.nan
    if mine and reference:
        ratio, low, high = stats.paired_ratio(reference.slowest, mine.slowest, mine.blocks)
    columns = {}
    for column, timing in (("t_seq", reference), ("t_overlap", mine)):
        times = stats.median_interval(timing.slowest) if timing else (math.nan,) * 3
        columns |= {f"{column}{end}_us": value for end, value in zip(("", "_lo", "_hi"), times, strict=True)}
    return {
        "configuration": point["configuration"],
        "comm_bytes": point["comm_bytes"],
        "matmul_n": point["matmul_n"],
        "launched": launched,
        "method": method,
        "leads": bool(plan and plan.leads),
        "backend": plan.backend if plan else "",
        "plan": str(plan) if plan else "",
        "dtype": point["dtype"],
        "num_ranks": context.num_ranks,
        "timing": mine.timing if mine else "",
        **columns,
        "speedup": ratio,
        "speedup_lo": low,
        "speedup_hi": high,
        "verdict": "" if math.isnan(low) else stats.verdict(low, high),
        "late_part": mine.num_late / len(mine.blocks) if mine else math.nan,
        "correct": mine is not None,
        "error": error,
    }


if __name__ == "__main__":
    worker.main(measure)
