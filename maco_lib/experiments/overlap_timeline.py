"""Profile one configuration of section 1: what ran where and when, sequential and overlapped."""

import json
import pathlib
import tempfile
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from maco_lib.experiments import worker
from maco_lib.experiments.overlap_methods import METHODS
from maco_lib.experiments.overlap_problem import Problem
from maco_lib.experiments.worker import Context, Result
from maco_lib.timing import SLEEP_CYCLES_PER_US, Arm, Barrier, gather, synchronize

# Longer than the host needs to issue the arm under the profiler, so that the trace shows the device at work.
BACKLOG_US = 3000
COMMUNICATION = ("nccl", "gloo", "all_reduce", "symm_mem")
SPIN = "spin_kernel"


def measure(point: dict[str, Any], context: Context) -> Result:
    problem = Problem(point, context)
    rows = []
    for name in point["methods"].split(","):
        backend = problem.backend(METHODS["device"][name])
        key = {"configuration": point["configuration"], "comm_bytes": point["comm_bytes"], "dtype": point["dtype"]}
        key |= {"matmul_n": point["matmul_n"], "method": name, "num_ranks": context.num_ranks}
        error = problem.use(backend)
        if not error:
            arm = problem.arm(name)
            error = problem.error(arm, backend, True)
        if error:
            nothing = {"lane": "", "name": "", "category": "comm", "start_us": 0.0, "duration_us": 0.0}
            rows.append({**key, "rank": 0, "event": 0, **nothing, "correct": False, "error": error})
            continue
        for rank, events in enumerate(gather(traced(arm, problem), problem.group)):
            for number, event in enumerate(events):
                rows.append({**key, "rank": rank, "event": number, **event, "correct": True, "error": ""})
    return Result(rows)


def traced(arm: Arm, problem: Problem) -> list[dict[str, Any]]:
    """This rank's events of one run of `arm`, in order of their start; times in µs since the first of them.

    The first of two profiles only warms the profiler up. A barrier within the profile starts the ranks together,
    whatever their profilers took to start; its own event comes first and is left out.
    """
    cuda = problem.device.type == "cuda"
    barrier = Barrier(problem.group, problem.device)
    for _ in range(2):
        if arm.prepare:
            arm.prepare()
        synchronize(problem.device)
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
            if cuda:
                torch.cuda._sleep(BACKLOG_US * SLEEP_CYCLES_PER_US)
            barrier()
            arm.run()
            synchronize(problem.device)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in trace if event.get("ph") == "X" and event.get("dur", 0) > 0]
    events = [describe(event) for event in spans if (is_kernel(event) if cuda else is_step(event))]
    _, *events = sorted(events, key=lambda event: event["start_us"]) or [None]
    if not events:
        raise RuntimeError(f"the profiler saw no event of {arm.name} among {len(spans)} spans")
    origin = events[0]["start_us"]
    return [{**event, "start_us": round(event["start_us"] - origin, 3)} for event in events]


def is_kernel(event: dict[str, Any]) -> bool:
    return event.get("cat") == "kernel" and SPIN not in event["name"]


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
