"""Section 5: what the fence that PTX asks for costs the persistent kernel (MACO_STRICT=1), beside its own fence."""

import math
from typing import Any

import torch

from maco_lib.linear.techniques import persistent
from maco_lib.linear.techniques.problem import Problem as Call
from maco_lib.timing import Timing, interleave
from study.harness import stats, worker
from study.harness.worker import Context, Result, samples_of
from study.sections.linear_all_reduce.measure import of_one_run, sampled
from study.sections.linear_all_reduce.problem import Outputs, Problem, Run

FENCES = {"default": False, "strict": True}


def run_of(problem: Problem, strict: bool) -> Run:
    """The kernel with its own tiling, behind that fence."""

    def run(number: int) -> Outputs:
        result = torch.empty_like(problem.product)
        call = Call(problem.x, problem.weights[number], None, None, result, "", problem.group)
        persistent.run(call, strict=strict)
        return (result,)

    return run


def judged(problem: Problem, runs: dict[str, Run]) -> str:
    """What is wrong with the results of the first run that is wrong, or "". Collective."""
    for name, run in runs.items():
        error, _, equal = problem.judge(run)
        if error or not equal:
            return f"{name} fence: {error or 'the result differs between the ranks'}"
    return ""


def measure(point: dict[str, Any], context: Context) -> Result:
    """Both fences interleaved, timed as the arms of section 5 are."""
    problem = Problem(point, context)
    problem.expect()
    runs = {name: run_of(problem, strict) for name, strict in FENCES.items()}
    why, timings = judged(problem, runs), {}
    if not why:
        arms = [sampled(problem, name, run, is_judged=True) for name, run in runs.items()]
        budget = {"budget_s": point["budget_s"], "min_iterations": point["min_iterations"]}
        timings = interleave(arms, group=problem.group, device=problem.device, **budget)
        why = next((f"{name} fence: {timing.error}" for name, timing in timings.items() if timing.error), "")
        timings = {name: of_one_run(timing, problem.num_runs) for name, timing in timings.items()}
    return Result([row(point, context, {} if why else timings, why)], samples_of(timings))


def row(point: dict[str, Any], context: Context, timings: dict[str, Timing], error: str) -> dict[str, Any]:
    """The reported row: none of the times where one of the two was wrong."""
    nothing, ends = (math.nan,) * 3, ("", "_lo", "_hi")
    times, ratios = dict.fromkeys(FENCES, nothing), nothing
    if timings:
        times = {name: stats.median_interval(timing.slowest) for name, timing in timings.items()}
        strict, default = timings["strict"], timings["default"]
        ratios = stats.paired_ratio(strict.slowest, default.slowest, default.blocks)
    return {
        **{column: point[column] for column in ("layer", "m", "n", "k", "dtype")},
        "tp": context.num_ranks,
        "timing": timings["default"].timing if timings else "",
        **{f"{name}{end}_us": value for name in FENCES for end, value in zip(ends, times[name], strict=True)},
        **{f"ratio{end}": value for end, value in zip(ends, ratios, strict=True)},
        "correct": not error,
        "error": error,
    }


if __name__ == "__main__":
    worker.main(measure)
