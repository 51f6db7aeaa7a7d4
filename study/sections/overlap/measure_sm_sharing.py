"""How long a matmul takes when it does not get all SMs: the tax that communication on SMs imposes, by itself.

On a CPU, where gloo's threads take cores, the same with fewer threads.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from maco_lib.comm import DTYPES
from maco_lib.overlap import execute
from maco_lib.overlap.sm_limit import leaving
from maco_lib.timing import Arm, interleave
from study.harness import stats, worker
from study.harness.machine import num_cores
from study.harness.rates import PUBLISHED_DTYPE
from study.harness.worker import Context, Result, samples_of

NUM_SMS = (4, 8, 12, 16, 32)
# Of the time of the matmul alone.
HOLDS = (0.2, 0.4, 0.6, 0.8, 1.0)
# Between the kernel that holds SMs and the matmul, so that the former is there first.
HEAD_START_US = 3.0
TOLERANCE = 1e-2


def measure(point: dict[str, Any], context: Context) -> Result:
    """A row per way of taking SMs from an n×n matmul by the point's `technique`, and one of the matmul alone."""
    device, technique = context.device, point["technique"]
    dtype = DTYPES[point.get("dtype", PUBLISHED_DTYPE)]
    a, b = (torch.randn(point["matmul_n"], point["matmul_n"], device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    matmul = functools.partial(torch.mm, a, b, out=product)
    expected = a[:1].double() @ b.double()

    def timed(arms: list[Arm]):
        request = {"budget_s": point["budget_s"], "min_iterations": point["min_iterations"]}
        return interleave(arms, group=None, device=device, **request)

    ways, arms, head_us = [("alone", 0, 0.0)], [Arm("alone", matmul)], 0.0
    error = ""
    try:
        if technique == "held":
            alone = stats.median_interval(timed(arms)["alone"].slowest)[0]
            ways += [("held", num_sms, part) for num_sms in NUM_SMS for part in HOLDS]
            arms += [Arm(str(way), held(matmul, way[1], way[2] * alone, device)) for way in ways[1:]]
            arms.append(Arm("head start", head_start))
        elif technique == "threads":
            cores = num_cores()
            ways += [(technique, taken, 1.0) for taken in (1, *NUM_SMS) if taken < cores]
            arms = [Arm(str(way), matmul, functools.partial(torch.set_num_threads, cores - way[1])) for way in ways]
        else:
            ways += [(technique, num_sms, 1.0) for num_sms in NUM_SMS]
            take = {"sm_target": told, "carveout": carved, "green_context": confined}[technique]
            arms += [Arm(str(way), take(matmul, way[1], device)) for way in ways[1:]]
        timings = timed(arms)
    except (RuntimeError, ValueError, AttributeError) as failure:
        error, timings = f"{type(failure).__name__}: {failure}", {}
    relative = float((product[:1].double() - expected).norm() / expected.norm())
    if timings and not relative < TOLERANCE:
        error = f"matmul: relative error {relative:.2g} is above {TOLERANCE}"
    if "head start" in timings:
        head_us = stats.median_interval(timings["head start"].slowest)[0]
    rows = []
    for number, (name, num_sms, part) in enumerate(ways):
        timing = None if error else timings[arms[number].name]
        times = stats.median_interval(timing.slowest) if timing else (math.nan,) * 3
        median, low, high = (value - (head_us if name == "held" else 0.0) for value in times)
        rows.append({
            "matmul_n": point["matmul_n"], "technique": name, "asked": technique, "num_sms": num_sms,
            "hold_part": part, "t_comp_us": median, "t_comp_lo_us": low, "t_comp_hi_us": high,
            "timing": timing.timing if timing else "", "correct": not error, "error": error,
        })  # fmt: skip
    return Result(rows, samples_of(timings))


def head_start() -> None:
    """A kernel of one CTA before the matmul: its time is taken off again."""
    from study.sections.overlap.hold import hold

    hold(1, HEAD_START_US)


def held(matmul: Callable, num_sms: int, hold_us: float, device: torch.device) -> Callable[[], None]:
    """The matmul while CTAs of another kernel hold `num_sms` SMs for its first `hold_us`."""
    from study.sections.overlap.hold import hold

    side = execute.side_stream(device, execute.highest_priority())

    def run() -> None:
        current = torch.cuda.current_stream(device)
        side.wait_event(current.record_event())
        with torch.cuda.stream(side):
            hold(num_sms, hold_us + HEAD_START_US)
        head_start()
        matmul()
        current.wait_event(side.record_event())

    return run


def told(matmul: Callable, num_sms: int, device: torch.device) -> Callable[[], None]:
    """The matmul, cuBLAS having been told to leave `num_sms` SMs (`sm_limit`)."""

    def run() -> None:
        with leaving(num_sms, device):
            matmul()

    return run


def carved(matmul: Callable, num_sms: int, device: torch.device) -> Callable[[], None]:
    """The matmul under torch's own setting of how many SMs to leave."""

    def run() -> None:
        torch._C._set_sm_carveout_experimental(num_sms)
        try:
            matmul()
        finally:
            torch._C._set_sm_carveout_experimental(None)

    return run


def confined(matmul: Callable, num_sms: int, device: torch.device) -> Callable[[], None]:
    """The matmul in a green context of all SMs but `num_sms`; RuntimeError where torch or the driver has none."""
    from torch.cuda.green_contexts import GreenContext

    total = torch.cuda.get_device_properties(device).multi_processor_count
    context = GreenContext.create(num_sms=total - num_sms, device_id=device.index)

    def run() -> None:
        context.set_context()
        try:
            matmul()
        finally:
            context.pop_context()

    return run


if __name__ == "__main__":
    worker.main(measure)
