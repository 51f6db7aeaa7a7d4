"""What every rank of an experiment does: read the specification, join the group, measure each point, report it.

An experiment program is `def measure(point, context) -> Result` and `worker.main(measure)`. torchrun starts it with the
path of a specification written by `study.results.launch`; rank 0 appends every finished point to the journal at once.
"""

import argparse
import contextlib
import datetime
import faulthandler
import json
import logging
import os
import pathlib
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from maco_lib.timing import Timing, interleave
from study.harness.journal import append_line
from study.harness.supervise import die_with_parent
from study.harness.watch import STACKS_SIGNAL, stacks_path

HEARTBEAT_S = 5.0


@dataclass
class Samples:
    """Raw values of one quantity: `values[rank][iteration]`, told apart from others of the point by `labels`."""

    quantity: str
    values: list[list[float]]
    labels: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """Rows of the reported table for one point (the store fills in its key and parameters), and the raw samples."""

    rows: list[dict[str, Any]]
    samples: list[Samples] = field(default_factory=list)


def samples_of(timings: Mapping[str, Timing]) -> list[Samples]:
    """The raw samples of interleaved arms in µs, with how each was taken; where it was read, the SM clock in MHz."""
    samples = []
    for arm, timing in timings.items():
        how = {"arm": arm, "timing": timing.timing, "repeats": timing.repeats, "num_late": timing.num_late}
        samples.append(Samples("time_us", [[round(value, 3) for value in rank] for rank in timing.values], how))
        if any(timing.clocks):
            clocks = [[round(value, 1) for value in rank] for rank in timing.clocks]
            samples.append(Samples("clock_mhz", clocks, how))
    return samples


@dataclass
class Context:
    """What a measurement knows of its surroundings. `state` lives as long as the process: engines, buffers, groups.

    A measurement calls `step()` wherever it got on, several times a minute: the program is stopped when no rank does.
    """

    rank: int
    num_ranks: int
    device: torch.device
    group: dist.ProcessGroup | None
    events: pathlib.Path
    state: dict[str, Any] = field(default_factory=dict)
    doing: str = ""
    steps: int = 0

    def step(self) -> None:
        """This rank got on; cheap, the heartbeat tells it."""
        self.steps += 1

    def note(self, doing: str) -> None:
        """Tell the progress bar what is going on; shown with the heartbeat. A step, too."""
        self.doing = doing
        self.step()
        if self.rank == 0:
            tell(self.events, "note", self.rank, doing=doing)


def tell(events: pathlib.Path, event: str, rank: int, **details: Any) -> None:
    append_line(events, {"event": event, "rank": rank, "time": time.time(), **details}, durable=False)


@contextlib.contextmanager
def heartbeat(context: Context):
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_S):
            tell(context.events, "alive", context.rank, step=context.steps, doing=context.doing)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def stepping(context: Context):
    """Every run that `timing.interleave` waits for, also within the planner's own measurements, is a step."""

    class Steps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            context.step()

    logger, handler = logging.getLogger(interleave.__module__), Steps()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def joined(num_ranks: int, kind: str, timeout_s: float):
    """This rank's device and process group (None for a single rank); NCCL on GPUs, gloo on CPUs.

    timeout_s: how long a collective waits for a rank; longer than the launcher waits for one that is stuck.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if num_ranks == 1:
        yield device, None
        return
    backend = {"cuda": "nccl", "cpu": "gloo"}[kind]
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(backend, timeout=timeout, device_id=device if kind == "cuda" else None)
    try:
        yield device, dist.group.WORLD
    finally:
        dist.destroy_process_group()


def main(measure: Callable[[dict, Context], Result]) -> None:
    """Entry point of a section's program under torchrun: `python -m study.sections.NAME.PROGRAM SPECIFICATION`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("specification", type=pathlib.Path)
    specification = json.loads(parser.parse_args().specification.read_text(encoding="utf-8"))
    die_with_parent()
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    events = pathlib.Path(specification["events"])
    with open(stacks_path(events, rank), "w", encoding="utf-8") as stacks:
        faulthandler.register(STACKS_SIGNAL, file=stacks)
        tell(events, "started", rank, pid=os.getpid())
        try:
            work(measure, specification, rank, num_ranks)
        except Exception as error:
            tell(events, "failed", rank, error=f"{type(error).__name__}: {error}")
            raise
        finally:
            faulthandler.unregister(STACKS_SIGNAL)
    if num_ranks > 1 and specification["kind"] == "cpu":
        leave()


def leave() -> NoReturn:
    """End this process, done, without Python's own end: a thread of gloo's that still drops a tensor then aborts it.

    (Of 20 times two processes that only summed and destroyed their group, 3 ended so; torch 2.13 on two busy cores.)
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def work(measure: Callable[[dict, Context], Result], specification: dict[str, Any], rank: int, num_ranks: int) -> None:
    """Measure every point of the specification; rank 0 records them."""
    events = pathlib.Path(specification["events"])
    with joined(num_ranks, specification["kind"], specification["collective_timeout_s"]) as (device, group):
        context = Context(rank, num_ranks, device, group, events)
        with heartbeat(context), stepping(context):
            for entry in specification["points"]:
                context.note(entry["label"])
                torch.manual_seed(zlib.crc32(f"{entry['key']}/{specification['launch']}/{rank}".encode()))
                begin = time.time()
                result = measure(entry["point"], context)
                if rank == 0:
                    line = {
                        "key": entry["key"],
                        "point": entry["point"],
                        "launch": specification["launch"],
                        "repeat": specification["repeat"],
                        "started": datetime.datetime.fromtimestamp(begin, datetime.UTC).isoformat(timespec="seconds"),
                        "seconds": round(time.time() - begin, 3),
                        "rows": result.rows,
                        "samples": [vars(samples) for samples in result.samples],
                    }
                    append_line(pathlib.Path(specification["journal"]), line)
                context.step()
                if rank == 0:
                    tell(events, "point", rank, label=entry["label"])
