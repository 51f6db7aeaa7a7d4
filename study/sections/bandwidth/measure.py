"""Measure section 3: one collective at one size over every backend of this device, interleaved."""

import math
import random
from typing import Any

from maco_lib import comm
from maco_lib.timing import Arm, Timing, decided, first_error, interleave
from study.harness import stats, worker
from study.harness.worker import Context, Result, samples_of


def measure(point: dict[str, Any], context: Context) -> Result:
    name, num_bytes = point["collective"], point["bytes"]
    dtype, group, device = comm.DTYPES[point["dtype"]], context.group, context.device
    numel = num_bytes // dtype.itemsize
    seed = decided(random.getrandbits(32), group)
    reference = comm.Reference(name, numel, dtype, device, context.rank, context.num_ranks, seed)
    arms, errors = [], {}
    asked = point["backends"].split(",") if "backends" in point else decided(comm.available(name, device, group), group)
    for backend in asked:
        context.step()
        if backend not in comm.BACKENDS:
            errors[backend] = f"this version has no backend {backend!r}"
            continue
        entry = comm.backend(backend)
        error = first_error(entry.unavailable(name, device, group) or "", group)
        try:
            if not error:
                operation = entry.operation(name, numel, dtype, device, group)
                error = comm.check(operation, reference)
        except (RuntimeError, ValueError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        errors[backend] = first_error(error, group)
        if errors[backend]:
            continue
        in_place = operation.result is operation.source
        restore = (lambda operation=operation: operation.source.copy_(reference.source)) if in_place else None
        arms.append(Arm(backend, operation.run, restore))
    budget = {"budget_s": point["budget_s"], "min_iterations": point["min_iterations"]}
    timings = interleave(arms, group=group, device=device, **budget) if arms else {}
    rows = []
    for backend, error in errors.items():
        key = {"collective": name, "backend": backend, "bytes": num_bytes, "dtype": point["dtype"]}
        rows.append({**key, **columns(name, num_bytes, timings.get(backend), context.num_ranks), "error": error})
    return Result(rows, samples_of(timings))


def columns(name: str, num_bytes: int, timing: Timing | None, num_ranks: int) -> dict[str, Any]:
    """Time of the slowest rank and the bandwidths that follow; NaN for a backend that gave a wrong result."""
    median, lo, hi = stats.median_interval(timing.slowest) if timing else (math.nan,) * 3
    algbw = comm.algbw(num_bytes, median * 1e-6)
    return {
        "num_ranks": num_ranks,
        "timing": timing.timing if timing else "",
        "time_us": median,
        "time_lo_us": lo,
        "time_hi_us": hi,
        "algbw_gb_per_s": algbw,
        "busbw_gb_per_s": comm.busbw(name, num_bytes, median * 1e-6, num_ranks),
        # As the published study defines it: twice the bytes over the time, whatever the number of ranks.
        "effective_bandwidth_gb_per_s": 2 * algbw,
        "correct": timing is not None,
    }


if __name__ == "__main__":
    worker.main(measure)
