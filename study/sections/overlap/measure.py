"""Measure section 1: an all-reduce and a matmul, one after the other and side by side, and each alone."""

import math
from typing import Any

from maco_lib.overlap.plan import Plan
from maco_lib.timing import Arm, Timing, first_error, interleave
from study.harness import stats, worker
from study.harness.worker import Context, Result, samples_of
from study.sections.overlap.methods import IDEAL_BACKENDS, METHODS, PUBLISHED, SWEEP, SWEEP_IDEAL_BACKENDS
from study.sections.overlap.problem import Problem
from study.sections.overlap.stretch import stretch

# Samples of the stretch factors, which are taken apart from the others.
STRETCH_SAMPLES = {"cuda": 10, "cpu": 3}


def measure(point: dict[str, Any], context: Context) -> Result:
    problem = Problem(point, context)
    errors: dict[str, str] = {}
    plans = {name: planned(problem, name, errors) for name in point["methods"].split(",")}
    arms = checked_arms(problem, point["configuration"], plans, errors)
    request = {name: point[name] for name in ("iterations", "budget_s", "min_iterations") if name in point}
    timings = interleave(
        arms, group=problem.group, device=problem.device, protocol=problem.protocol,
        warmup=3 if context.device.type == "cuda" else 1, **request,
    )  # fmt: skip
    stretches = {}
    if problem.protocol == "device":
        overlapped = {name: plan for name, plan in plans.items() if name in timings and plan.overlapped}
        num_samples = STRETCH_SAMPLES[context.device.type]
        stretches = {name: stretch(problem, plan, num_samples) for name, plan in overlapped.items()}
    rows = [row(point, context, problem, name, plan, timings, stretches, errors) for name, plan in plans.items()]
    return Result(rows, samples_of(timings))


def planned(problem: Problem, name: str, errors: dict[str, str]) -> Plan | None:
    """The plan of a method; None where the planner failed, with `errors[name]` saying why. Collective."""
    doing = problem.context.doing
    if METHODS[problem.protocol][name] == "auto":
        problem.context.note(f"{doing}: choosing a plan")
    try:
        plan, why = problem.plan(name), ""
    except (RuntimeError, ValueError) as error:
        plan, why = None, f"{type(error).__name__}: {error}"
    problem.context.doing = doing
    errors[name] = first_error(why, problem.group)
    return None if errors[name] else plan


def checked_arms(
    problem: Problem, configuration: str, plans: dict[str, Plan | None], errors: dict[str, str]
) -> list[Arm]:
    """The arms that gave the right result; `errors` says what was wrong with the others, by arm or method."""
    arms = []

    def admit(arm: Arm, operation: str | None, computes: bool) -> None:
        errors[arm.name] = problem.error(arm, operation, computes)
        if not errors[arm.name]:
            arms.append(arm)

    admit(Arm("compute", problem.matmul), None, True)
    ours = [plan.backend for plan in plans.values() if plan]
    ideal = SWEEP_IDEAL_BACKENDS if configuration == SWEEP else IDEAL_BACKENDS
    alone = ideal[problem.device.type] if problem.protocol == "device" else []
    for backend in dict.fromkeys([problem.default, *alone, *ours]):
        errors[f"comm:{backend}"] = problem.use(backend)
        if errors[f"comm:{backend}"]:
            continue
        admit(problem.communication(backend), backend, False)
        # The speedup over sequential NCCL is split at the same backend's sequential time.
        if backend in ours and backend != problem.default:
            admit(problem.sequential(f"sequential:{backend}", backend), backend, True)
    for name, plan in plans.items():
        errors[name] = errors[name] or problem.unusable.get(plan.backend, "")
        if not errors[name]:
            automatic = METHODS[problem.protocol][name] == "auto"
            admit(problem.arm(name), "auto" if automatic else plan.backend, True)
    return arms


def row(
    point: dict,
    context: Context,
    problem: Problem,
    name: str,
    plan: Plan | None,
    timings: dict[str, Timing],
    stretches: dict[str, tuple[float, float]],
    errors: dict[str, str],
) -> dict[str, Any]:
    """The reported row of one method: times with intervals, ratios to the ideal and to sequential."""
    backend = plan.backend if plan else ""
    # The published study reports means; medians elsewhere.
    statistic = "mean" if problem.protocol == "published" else "median"
    summarise = stats.mean_interval if statistic == "mean" else stats.median_interval

    def time(arm: str) -> tuple[float, float, float]:
        return summarise(timings[arm].slowest) if arm in timings else (math.nan,) * 3

    def clock(arm: str) -> float:
        return timings[arm].clock_mhz if arm in timings else math.nan

    times = {"t_comm": f"comm:{backend}", "t_comp": "compute", "t_seq": "sequential", "t_overlap": name}
    columns: dict[str, Any] = {}
    for column, arm in times.items():
        for bound, value in zip(("", "_lo", "_hi"), time(arm), strict=True):
            columns[f"{column}{bound}_us"] = value
    comm, comp = columns["t_comm_us"], columns["t_comp_us"]
    sequential, mine = columns["t_seq_us"], columns["t_overlap_us"]
    best = min((time(arm)[0] for arm in timings if arm.startswith("comm:")), default=math.nan)
    ideal = max(comp, best) if comp == comp else math.nan
    ratio = lo = hi = math.nan
    if name in timings and "sequential" in timings:
        reference, this = timings["sequential"], timings[name]
        ratio, lo, hi = stats.paired_ratio(reference.slowest, this.slowest, this.blocks, statistic=statistic)
    own = sequential if backend == problem.default else time(f"sequential:{backend}")[0]
    sigma_comm, sigma_comp = stretches.get(name, (math.nan, math.nan))
    return {
        "configuration": point["configuration"],
        "comm_bytes": point["comm_bytes"],
        "matmul_n": point["matmul_n"],
        "protocol": point["protocol"],
        "method": name,
        "backend": backend,
        "plan": str(plan) if plan else "",
        "dtype": point["dtype"],
        "num_ranks": context.num_ranks,
        "published_size": PUBLISHED.get(point["configuration"]) == (point["comm_bytes"], point["matmul_n"]),
        "timing": timings[name].timing if name in timings else "",
        **columns,
        "clock_mhz": clock(name),
        "compute_clock_mhz": clock("compute"),
        "t_comm_best_us": best,
        "t_seq_backend_us": own,
        "ideal_us": ideal,
        "speedup": ratio,
        "speedup_lo": lo,
        "speedup_hi": hi,
        "speedup_collective": sequential / own,
        "speedup_overlap": own / mine,
        "fraction_of_ideal": ideal / mine,
        "eta": (comm + comp - mine) / min(comm, comp),
        "sigma_comm": sigma_comm / comm,
        "sigma_comp": sigma_comp / comp,
        "verdict": "" if lo != lo else stats.verdict(lo, hi),
        "correct": name in timings,
        "error": errors[name],
    }


if __name__ == "__main__":
    worker.main(measure)
