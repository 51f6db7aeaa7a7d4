"""Section 5: what a call costs the host, beside the same by torch and the default collective.

On a GPU many calls are issued behind a kernel that keeps it busy, so that nothing but the host is timed; on a CPU one
call at a time, which is then its whole time. Arms in random order in every round, a barrier before each.
"""

import random
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from maco_lib import comm
from maco_lib import context as contexts
from maco_lib.overlap import linear_all_reduce, linear_all_reduce_norm, overlap
from maco_lib.overlap.search import most_calls
from maco_lib.timing import SLEEP_CYCLES_PER_US, decided, first_error, gather, synchronize
from study.harness import worker
from study.harness.stats import median_interval, paired_ratio
from study.harness.worker import Context, Result, Samples
from study.sections.linear_all_reduce.methods import CHAIN, MATMUL, OVERLAP
from study.sections.linear_all_reduce.problem import EPS, Problem

# Of an issued call; and how long the GPU is kept busy for each, which no call of any arm takes.
NUM_CALLS, BUSY_US = 10, 1000
Call = Callable[[], tuple[torch.Tensor, ...]]


class Operation:
    """An operation of ours and the same by hand, on one problem. `forget`: before every call that is not prepared."""

    def __init__(self, name: str, ours: Call, baseline: Call, forgets: bool):
        self.name, self.ours, self.baseline, self.forgets = name, ours, baseline, forgets


def operations(problem: Problem, side: torch.cuda.Stream | None) -> list[Operation]:
    """Those of a point, on its first weight."""
    x, weight, group, linear = problem.x, problem.weights[0], problem.group, torch.nn.functional.linear
    residual, norm_weight, n = problem.residual, problem.norm_weight, problem.n
    product, gradient = torch.empty_like(problem.product), torch.zeros_like(problem.product)

    def by_hand() -> tuple[torch.Tensor, ...]:
        total = linear(x, weight)
        dist.all_reduce(total, group=group)
        return (total,)

    def chain_by_hand() -> tuple[torch.Tensor, ...]:
        total = torch.add(*by_hand(), residual)
        return torch.nn.functional.rms_norm(total, (n,), norm_weight, EPS), total

    def compute() -> torch.Tensor:
        return torch.mm(x, weight.t(), out=product)

    def overlapped_by_hand() -> tuple[torch.Tensor, ...]:
        if side is None:
            work = dist.all_reduce(gradient, group=group, async_op=True)
            compute()
            work.wait()
            return product, gradient
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            dist.all_reduce(gradient, group=group)
        compute()
        current.wait_stream(side)
        return product, gradient

    def ours() -> tuple[torch.Tensor, ...]:
        return (linear_all_reduce(x, weight, group=group),)

    def chain() -> tuple[torch.Tensor, ...]:
        return linear_all_reduce_norm(x, weight, residual, norm_weight, EPS, group=group)

    def overlapped() -> tuple[torch.Tensor, ...]:
        return overlap(compute, gradient, group=group, plan="auto", key=f"host cost, {problem.m} rows")

    return [
        Operation(MATMUL, ours, by_hand, False),
        Operation(MATMUL, ours, by_hand, True),
        Operation(CHAIN, chain, chain_by_hand, False),
        Operation(CHAIN, chain, chain_by_hand, True),
        Operation(OVERLAP, overlapped, overlapped_by_hand, False),
    ]


def host_us(call: Call, num_calls: int, problem: Problem, forget: Callable[[], None] | None) -> float:
    """Mean host time of a call, in µs, on the slowest rank."""
    dist.barrier(problem.group)
    synchronize(problem.device)
    if problem.device.type == "cuda":
        torch.cuda._sleep(num_calls * BUSY_US * SLEEP_CYCLES_PER_US)
    elapsed = 0.0
    for _ in range(num_calls):
        if forget:
            forget()
        begin = time.perf_counter()
        call()
        elapsed += time.perf_counter() - begin
    synchronize(problem.device)
    return max(gather(elapsed * 1e6 / num_calls, problem.group))


def wrong(operation: Operation, problem: Problem) -> str:
    """What differs from the same by hand by more than roundings, on any rank."""
    bound = 4 * problem.group.size() * torch.finfo(problem.dtype).eps
    error = ""
    for got, expected in zip(operation.ours(), operation.baseline(), strict=True):
        distance = float((got.double() - expected.double()).norm()) / max(float(expected.double().norm()), 1e-30)
        if not distance <= bound:
            error = f"{operation.name}: differs by {distance:.1e} of the same by hand"
    return first_error(error, problem.group)


def measure(point: dict[str, Any], context: Context) -> Result:
    """Every operation on the point's shape, prepared and not, beside the same by hand in the same rounds."""
    problem = Problem(point, context)
    prepared = contexts.of(problem.group, problem.device)
    prepared.prepare(problem.weights[:1], [problem.m])
    on_gpu = problem.device.type == "cuda"
    every = operations(problem, torch.cuda.Stream() if on_gpu else None)
    for _ in range(most_calls(len(comm.BACKENDS), on_gpu) + 1):  # then the plan of `overlap` is settled
        every[-1].ours()
    errors = [wrong(operation, problem) for operation in every]
    num_calls, order = NUM_CALLS if on_gpu else 1, random.Random(decided(random.getrandbits(32), problem.group))
    values: dict[tuple[int, bool], list[float]] = {}
    for _ in range(point["num_rounds"] + 1):
        arms = [(number, is_ours) for number in range(len(every)) for is_ours in (True, False)]
        for number, is_ours in order.sample(arms, len(arms)):
            operation = every[number]
            forget = prepared.state.calls.clear if is_ours and operation.forgets else None
            call = operation.ours if is_ours else operation.baseline
            if is_ours and not forget:
                call()  # what the arm before has forgotten
            values.setdefault((number, is_ours), []).append(host_us(call, num_calls, problem, forget))
    rows, samples = [], []
    for number, operation in enumerate(every):
        # The first round warms up.
        ours, baseline = values[number, True][1:], values[number, False][1:]
        ratio, _, ratio_hi = paired_ratio(ours, baseline)
        median, lo, hi = median_interval(ours)
        rows.append({
            **{name: point[name] for name in ("layer", "m", "n", "k", "dtype")},
            "tp": context.num_ranks, "operation": operation.name, "prepared": not operation.forgets,
            "host_us": median, "host_lo_us": lo, "host_hi_us": hi, "baseline_us": median_interval(baseline)[0],
            "ratio": ratio, "ratio_hi": ratio_hi, "correct": not errors[number], "error": errors[number],
        })  # fmt: skip
        labels = {"operation": operation.name, "prepared": not operation.forgets}
        for quantity, taken in (("host_us", ours), ("baseline_us", baseline)):
            samples.append(Samples(quantity, [[round(value, 3) for value in taken]], labels))
    return Result(rows, samples)


if __name__ == "__main__":
    worker.main(measure)
