"""Profile one layer of section 5: what ran where and when, by each technique."""

from typing import Any

from maco_lib.timing import Arm, first_error, gather
from study.harness import worker
from study.harness.worker import Context, Result
from study.sections.linear_all_reduce.arms import run_of
from study.sections.linear_all_reduce.measure import UNUSABLE
from study.sections.linear_all_reduce.methods import MATMUL
from study.sections.linear_all_reduce.problem import Problem
from study.sections.overlap.measure_timeline import traced

# Methods whose kernel of the same name multiplies and communicates.
FUSED = ("persistent",)
NOTHING = {"lane": "", "name": "", "category": "comm", "start_us": 0.0, "duration_us": 0.0}


def measure(point: dict[str, Any], context: Context) -> Result:
    problem, rows = Problem(point, context), []
    problem.expect()
    for name in point["methods"].split(","):
        key = {"layer": point["layer"], "m": point["m"], "n": point["n"], "k": point["k"], "tp": context.num_ranks,
               "dtype": point["dtype"], "method": name}  # fmt: skip
        timing, by_rank, error = profiled(problem, name)
        if error:
            rows.append({**key, "rank": 0, "event": 0, **NOTHING, "timing": timing, "correct": False, "error": error})
            continue
        for rank, events in enumerate(by_rank):
            rows += [
                {**key, "rank": rank, "event": number, **event, "timing": timing, "correct": True, "error": ""}
                for number, event in enumerate(events)
            ]
    return Result(rows)


def profiled(problem: Problem, name: str) -> tuple[str, list[list[dict[str, Any]]], str]:
    """(how it was run, events by rank, what was wrong or ""). Collective."""
    try:
        run, why = run_of(problem, MATMUL, name), ""
    except UNUSABLE as error:
        run, why = None, f"{type(error).__name__}: {error}"
    why = first_error(why, problem.group)
    if not why:
        why = problem.judge(run)[0]
    if why:
        return "", [], why
    timing, events = traced(Arm(name, lambda: run(0), problem.chill), problem)
    for event in events:
        if name in FUSED and name in event["name"].lower():
            event["category"] = "fused"
    by_rank = gather(events, problem.group)
    if not all(by_rank):
        why = f"rank {by_rank.index([])}: the profiler saw nothing of {name}"
    return timing, by_rank, why


if __name__ == "__main__":
    worker.main(measure)
