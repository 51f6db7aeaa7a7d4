"""How long the all-reduce and the matmul each take while both run: the numerators of the stretch factors σ."""

import threading
import time

import numpy as np
import torch

from maco_lib.overlap import execute
from maco_lib.overlap.plan import Plan
from maco_lib.timing import SLEEP_CYCLES_PER_US, Barrier, gather
from study.sections.overlap.problem import Problem

# Longer than the host needs to issue one sample, so that both sides start together.
BACKLOG_US = 500
CALLBACK_TIMEOUT_S = 10.0


def stretch(problem: Problem, plan: Plan, num_samples: int) -> tuple[float, float]:
    """(communication, computation) in µs while both run: median over samples of the slowest rank. Collective."""
    sample = device_sample if problem.device.type == "cuda" else host_sample
    barrier = Barrier(problem.group, problem.device)
    restore = problem.restore(problem.backend(plan))
    mine = []
    for _ in range(num_samples + 1):
        if restore:
            restore()
        mine.append(sample(problem, plan, barrier))
        problem.context.step()
    # ranks × samples × sides, the first sample being the warm-up
    every_rank = np.array(gather(mine[1:], problem.group))
    communication, computation = np.median(every_rank.max(axis=0), axis=0)
    return float(communication), float(computation)


def device_sample(problem: Problem, plan: Plan, barrier: Barrier) -> tuple[float, float]:
    """CUDA events around each side, issued eagerly behind a backlog."""
    operation = problem.operations[problem.backend(plan)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    torch.cuda._sleep(BACKLOG_US * SLEEP_CYCLES_PER_US)
    barrier()

    def communicate(async_op: bool) -> None:
        events[0].record()
        operation.run(async_op)
        events[1].record()

    def compute() -> None:
        events[2].record()
        problem.matmul()
        events[3].record()

    execute.run_plan(plan, compute, communicate, operation.result, (operation.source,))
    torch.cuda.synchronize(problem.device)
    return events[0].elapsed_time(events[1]) * 1e3, events[2].elapsed_time(events[3]) * 1e3


def host_sample(problem: Problem, plan: Plan, barrier: Barrier) -> tuple[float, float]:
    """The host's clock; gloo's thread says when the collective ended."""
    operation = problem.operations[problem.backend(plan)]
    ended, ended_at = threading.Event(), []

    def note(_) -> None:
        ended_at.append(time.perf_counter())
        ended.set()

    barrier()
    begin = time.perf_counter()
    work = operation.run(True)
    work.get_future().add_done_callback(note)
    computing = time.perf_counter()
    problem.matmul()
    computed = time.perf_counter()
    work.wait()
    if not ended.wait(CALLBACK_TIMEOUT_S):
        raise RuntimeError(f"no word of a finished all-reduce within {CALLBACK_TIMEOUT_S} s")
    return (ended_at[0] - begin) * 1e6, (computed - computing) * 1e6
