"""Profile one configuration of section 1: what ran where and when, sequential and overlapped.

On GPUs it is a replay of the CUDA graph that is timed: the order of eager launches is the host's, who jitters.
"""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from maco_lib.timing import SLEEP_CYCLES_PER_US, Arm, Barrier, capture, first_error, gather, synchronize
from study.harness import worker
from study.harness.worker import Context, Result
from study.sections.overlap.methods import METHODS
from study.sections.overlap.problem import Problem

# Longer than the host needs to issue the arm under the profiler, so that the trace shows the device at work.
BACKLOG_US = 3000
# Kernels of a collective, and those that wait to begin one, by their names; and copies: some use the copy engine.
COMMUNICATION = (
    "nccl",
    "gloo",
    "all_reduce",
    "symm_mem",
    "one_shot",
    "two_shot",
    "sum_shares",
    "add_share",
    "maco",
    "memcpy",
)
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
SPIN = "spin_kernel"
HEAD_START_US = 8


def measure(point: dict[str, Any], context: Context) -> Result:
    problem = Problem(point, context)
    rows = []
    for name in point["methods"].split(","):
        backend = problem.backend(METHODS["device"][name])
        key = {"configuration": point["configuration"], "comm_bytes": point["comm_bytes"], "dtype": point["dtype"]}
        key |= {"matmul_n": point["matmul_n"], "method": name, "num_ranks": context.num_ranks}
        error = problem.use(backend)
        if not error:
            with collective_first(problem, name):
                arm = problem.arm(name)
            error = problem.error(arm, backend, True)
        timing, events = ("", []) if error else traced(arm, problem)
        by_rank = gather(events, problem.group)
        if not error and not all(by_rank):
            error = f"rank {by_rank.index([])}: the profiler saw nothing of {name}"
        if error:
            nothing = {"lane": "", "name": "", "category": "comm", "start_us": 0.0, "duration_us": 0.0}
            rows.append({**key, "rank": 0, "event": 0, **nothing, "timing": timing, "correct": False, "error": error})
            continue
        for rank, events in enumerate(by_rank):
            for number, event in enumerate(events):
                rows.append({
                    **key, "rank": rank, "event": number, **event, "timing": timing, "correct": True, "error": "",
                })  # fmt: skip
    return Result(rows)


@contextlib.contextmanager
def collective_first(problem: Problem, name: str) -> Iterator[None]:
    """Arms made within issue the matmul a little late, where the plan wants the collective to get its SMs first.

    Timed replays begin so by themselves; under the profiler a graph's branches begin in another order.
    """
    plan = METHODS["device"][name]
    if problem.device.type != "cuda" or not plan.overlapped or plan.compute_first:
        yield
        return
    matmul = problem.matmul

    def late() -> None:
        torch.cuda._sleep(HEAD_START_US * SLEEP_CYCLES_PER_US)
        matmul()

    problem.matmul = late
    try:
        yield
    finally:
        del problem.matmul


def traced(arm: Arm, problem: Problem) -> tuple[str, list[dict[str, Any]]]:
    """How `arm` was run once, and this rank's events in order of their start; times in µs since the first of them.

    "graph": the replay of a graph of one run, "eager": launched by the host, where a rank cannot capture it, "host": on
    CPUs. The first of two profiles only warms the profiler up. A barrier within the profile starts the ranks together,
    whatever their profilers took to start; its own event comes first and is left out.
    """
    cuda = problem.device.type == "cuda"
    barrier = Barrier(problem.group, problem.device)
    graph, why = capture(arm.run, 1) if cuda else (None, "")
    timing = "host" if not cuda else "eager" if first_error(why, problem.group) else "graph"
    run = graph.replay if timing == "graph" else arm.run
    for _ in range(2):
        if arm.prepare:
            arm.prepare()
        synchronize(problem.device)
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
            if cuda:
                torch.cuda._sleep(BACKLOG_US * SLEEP_CYCLES_PER_US)
            barrier()
            run()
            synchronize(problem.device)
        problem.context.step()
    if graph is not None:
        graph.reset()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    spans = [event for event in trace if event.get("ph") == "X" and event.get("dur", 0) > 0]
    described = [describe(event) for event in spans if (is_device_work(event) if cuda else is_step(event))]
    events = sorted(described, key=lambda event: event["start_us"])[1:]
    return timing, [{**event, "start_us": round(event["start_us"] - events[0]["start_us"], 3)} for event in events]


def is_device_work(event: dict[str, Any]) -> bool:
    """On GPUs: kernels, copies and fills, without the backlog."""
    return event.get("cat") in DEVICE_WORK and SPIN not in event["name"]


def is_step(event: dict[str, Any]) -> bool:
    """On CPUs: the matmul, and gloo's record of the collective from its start to its end."""
    return event["name"] == "aten::mm" or event["name"].startswith("gloo:")


def describe(event: dict[str, Any]) -> dict[str, Any]:
    communicates = any(word in event["name"].lower() for word in COMMUNICATION)
    stream = event.get("args", {}).get("stream")
    lane = f"stream {stream}" if stream is not None else ("gloo" if communicates else "compute")
    category = "comm" if communicates else "compute"
    times = {"start_us": float(event["ts"]), "duration_us": float(event["dur"])}
    return {"lane": lane, "name": event["name"], "category": category, **times}


if __name__ == "__main__":
    worker.main(measure)
