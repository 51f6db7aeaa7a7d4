"""Measure section 5: a row-parallel layer's matmul and all-reduce, and at few rows with residual and RMSNorm after it.

A timed sample is `Problem.num_runs` runs, each on the next of the weights, so that they come from memory and not from a
cache; the input and the residual are in it, as the layer before leaves them. Times are of one run.
"""

import dataclasses
import functools
import math
from typing import Any

from maco_lib.kernels.tile_order import CTAS
from maco_lib.linear.techniques.persistent_time import fastest_tiling
from maco_lib.timing import Arm, Timing, first_error, interleave
from study.harness import stats, worker
from study.harness.worker import Context, Result, samples_of
from study.sections.linear_all_reduce.arms import chunks_alone, described, run_of
from study.sections.linear_all_reduce.methods import BASE, CHAIN, FEW_ROWS, IDEAL_BACKENDS, MATMUL, METHODS
from study.sections.linear_all_reduce.problem import Outputs, Problem, Run

UNUSABLE = (RuntimeError, ValueError, ImportError, AttributeError)


@dataclasses.dataclass
class Checked:
    """What the check of one method found; `run` is None where it cannot be used or gave a wrong result."""

    run: Run | None
    error: str
    relative_error: float = math.nan
    equal_on_ranks: bool = False


def measure(point: dict[str, Any], context: Context) -> Result:
    problem = Problem(point, context)
    problem.expect()
    asked = {MATMUL: point["methods"].split(","), CHAIN: [name for name in point["chain_methods"].split(",") if name]}
    found = {
        (operation, name): checked(problem, operation, name) for operation, names in asked.items() for name in names
    }
    arms = [sampled(problem, "matmul", chunks_alone(problem, 1)), *communications(problem)]
    if problem.m > FEW_ROWS:
        counts = {METHODS[MATMUL][name].num_chunks for name in asked[MATMUL]} - {1}
        arms += [sampled(problem, f"matmul:{count}", chunks_alone(problem, count)) for count in sorted(counts)]
    arms += [sampled(problem, arm_name(*key), one.run, is_judged=True) for key, one in found.items() if one.run]
    budget = {"budget_s": point["budget_s"], "min_iterations": point["min_iterations"]}
    warmup = 2 if context.device.type == "cuda" else 1
    timings = interleave(arms, group=problem.group, device=problem.device, warmup=warmup, **budget)
    for key, one in found.items():
        if one.run and (error := timings[arm_name(*key)].error):
            found[key] = Checked(None, error)
            del timings[arm_name(*key)]
    timings = {name: of_one_run(timing, problem.num_runs) for name, timing in timings.items()}
    rows = [row(point, problem, *key, found, timings) for key in found]
    return Result(rows, samples_of(timings))


def arm_name(operation: str, method: str) -> str:
    return f"{operation}:{method}"


def checked(problem: Problem, operation: str, name: str) -> Checked:
    """A method's run, if it gives the right result. Collective."""
    try:
        run, why = run_of(problem, operation, name), ""
    except UNUSABLE as error:
        run, why = None, f"{type(error).__name__}: {error}"
    if why := first_error(why, problem.group):
        return Checked(None, why)
    error, relative, equal = problem.judge(run)
    if not (error or equal or METHODS[operation][name].is_peer):
        error = "the result differs between the ranks"
    return Checked(None if error else run, error, relative, equal)


def sampled(problem: Problem, name: str, run: Run, is_judged: bool = False) -> Arm:
    """An arm of `num_runs` runs, on weights that are in no cache; judged: in the end, by what a sample leaves."""
    left: list[Outputs] = []

    def sample() -> None:
        for number in range(problem.num_runs):
            left[:] = [run(number % len(problem.weights))]

    return Arm(name, sample, problem.chill, functools.partial(problem.judge_timed, left) if is_judged else None)


def communications(problem: Problem) -> list[Arm]:
    """The all-reduces alone, those that can be used here; what they sum was written just before."""
    arms = []
    many, few = IDEAL_BACKENDS[problem.device.type]
    for backend in few if problem.m <= FEW_ROWS else many:
        try:
            operation, why = problem.operation(backend), ""
        except UNUSABLE as error:
            operation, why = None, f"{type(error).__name__}: {error}"
        if first_error(why, problem.group):
            continue

        def sample(operation=operation) -> None:
            for _ in range(problem.num_runs):
                operation.run()

        arms.append(Arm(f"comm:{backend}", sample, functools.partial(problem.refill, operation)))
    return arms


def of_one_run(timing: Timing, num_runs: int) -> Timing:
    values = [[value / num_runs for value in rank] for rank in timing.values]
    return dataclasses.replace(timing, values=values, repeats=timing.repeats * num_runs)


def row(
    point: dict,
    problem: Problem,
    operation: str,
    name: str,
    found: dict[tuple[str, str], Checked],
    timings: dict[str, Timing],
) -> dict[str, Any]:
    """The reported row of one method of one operation."""
    method, one, base_name = METHODS[operation][name], found[operation, name], BASE[problem.device.type]

    def time(arm: str) -> tuple[float, float, float]:
        return stats.median_interval(timings[arm].slowest) if arm in timings else (math.nan,) * 3

    def clock(arm: str) -> float:
        return timings[arm].clock_mhz if arm in timings else math.nan

    def interval(column: str, arm: str) -> dict[str, float]:
        return {f"{column}{end}_us": value for end, value in zip(("", "_lo", "_hi"), time(arm), strict=True)}

    arm, base = arm_name(operation, name), arm_name(operation, base_name)
    mine, matmul = time(arm)[0], time("matmul")[0]
    comms = {other.removeprefix("comm:"): time(other)[0] for other in timings if other.startswith("comm:")}
    fastest = min(comms, key=comms.get, default="")
    best = comms.get(fastest, math.nan)
    ideal = max(matmul, best)
    ratio = lo = hi = math.nan
    if arm in timings and base in timings:
        before, after = timings[base], timings[arm]
        ratio, lo, hi = stats.paired_ratio(before.slowest, after.slowest, before.blocks)
    plan = described(problem, operation, name) if one.run else ""
    return {
        "layer": point["layer"],
        "m": point["m"],
        "n": point["n"],
        "k": point["k"],
        "tp": problem.context.num_ranks,
        "operation": operation,
        "method": name,
        "is_peer": method.is_peer,
        "technique": method.plan.get("technique", method.how),
        "backend": method.backend,
        "plan": plan,
        "tiling": tiling(problem, plan) if one.run else "",
        "dtype": point["dtype"],
        "timing": timings[arm].timing if arm in timings else "",
        "num_runs": problem.num_runs,
        **interval("time", arm),
        **interval("t_matmul", "matmul"),
        "clock_mhz": clock(arm),
        "matmul_clock_mhz": clock("matmul"),
        "t_matmul_chunked_us": time(f"matmul:{method.num_chunks}")[0],
        "t_comm_us": best,
        "t_comm_backend": fastest,
        "t_base_us": time(base)[0],
        "ideal_us": ideal,
        "ect_us": mine - matmul,
        "fraction_of_ideal": ideal / mine,
        "speedup": ratio,
        "speedup_lo": lo,
        "speedup_hi": hi,
        "relative_error": one.relative_error,
        "base_error": found[operation, base_name].relative_error if (operation, base_name) in found else math.nan,
        "equal_on_ranks": one.equal_on_ranks,
        "num_sms": problem.num_sms,
        "correct": arm in timings,
        "error": one.error,
    }


def tiling(problem: Problem, plan: str) -> str:
    """The tiles that the plan of that name takes here; "" of one without."""
    technique, _, told = plan.partition(":")
    if technique != "persistent":
        return ""
    if told:
        return told
    share, num_ranks = problem.x.shape[1], problem.context.num_ranks
    return str(fastest_tiling(problem.m, problem.n, share, num_ranks, problem.num_sms // CTAS))


if __name__ == "__main__":
    worker.main(measure)
