"""Section 5's methods over and over: the same bits every time, and no hang or growth over calls of changing shapes."""

import random
import time
from typing import Any

import torch

from maco_lib.timing import first_error, gather, synchronize
from study.harness import worker
from study.harness.worker import Context, Result
from study.sections.linear_all_reduce.arms import run_of
from study.sections.linear_all_reduce.measure import UNUSABLE
from study.sections.linear_all_reduce.methods import CHAIN, FEW_ROWS, MATMUL, METHODS
from study.sections.linear_all_reduce.problem import Problem, Run

# Memory is compared after so many of the calls, when every buffer has its size.
SETTLED = 0.2


def measure(point: dict[str, Any], context: Context) -> Result:
    """The point's method, repeated on one shape, then called on `num_calls` shapes in a random order."""
    problem, name = Problem(point, context), point["method"]
    operation = MATMUL if name in METHODS[MATMUL] else CHAIN
    problem.expect()
    facts = {"num_identical": 0, "grown_bytes": 0, "seconds": 0.0}
    try:
        run, why = run_of(problem, operation, name), ""
    except UNUSABLE as error:
        run, why = None, f"{type(error).__name__}: {error}"
    why = first_error(why, problem.group) or problem.judge(run)[0]
    if not why:
        facts["num_identical"] = min(gather(identical(run, point["num_repeats"], problem), problem.group))
        begin = time.perf_counter()
        facts["grown_bytes"] = max(gather(growth(run, operation, point["num_calls"], problem), problem.group))
        facts["seconds"] = time.perf_counter() - begin
    return Result([{
        **{column: point[column] for column in ("layer", "m", "n", "k", "method", "dtype", "num_repeats", "num_calls")},
        "tp": context.num_ranks, "operation": operation, **facts, "correct": not why, "error": why,
    }])  # fmt: skip


def identical(run: Run, num_repeats: int, problem: Problem) -> int:
    """How many of `num_repeats` runs, on x and -x in turn, gave the bits of the first on theirs.

    In turn, as on the same data what an earlier run left passes for the result.
    """

    def on_the_other() -> tuple[torch.Tensor, ...]:
        problem.x.neg_()
        return run(0)

    firsts = [tuple(output.clone() for output in on_the_other()) for _ in range(2)]
    count = torch.zeros((), dtype=torch.int64, device=problem.device)
    for number in range(num_repeats):
        same = [(one == other).all() for one, other in zip(firsts[number % 2], on_the_other(), strict=True)]
        count += torch.stack(same).all()
        problem.context.step()
    return int(count)


def growth(run: Run, operation: str, num_calls: int, problem: Problem) -> int:
    """Bytes of device memory (on a CPU: of the process) more after all calls than after the first part of them."""
    whole, most = problem.x, FEW_ROWS if operation == CHAIN else problem.m
    shapes = random.Random(num_calls)  # the same on every rank
    residual, before = problem.residual, 0
    for number in range(num_calls):
        if number == int(SETTLED * num_calls):
            before = in_use(problem)
        # Largest first: buffers are made once.
        rows = most if number == 0 else shapes.randint(1, most)
        problem.m, problem.x, problem.residual = rows, whole[:rows], residual[:rows]
        run(0)
        problem.context.step()
    synchronize(problem.device)
    return in_use(problem) - before


def in_use(problem: Problem) -> int:
    if problem.device.type == "cuda":
        synchronize(problem.device)
        free, total = torch.cuda.mem_get_info(problem.device)
        return total - free
    import psutil

    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    worker.main(measure)
