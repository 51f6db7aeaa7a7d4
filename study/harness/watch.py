"""Follow a program of several ranks until it ends, or until none of them makes progress: slow is not stuck."""

import os
import pathlib
import re
import signal
import subprocess
import time
from typing import Any

from study.harness.files import without_places
from study.harness.journal import Tail
from study.harness.progress import Progress

# A forecast is off by what a first call compiles and by what runs beside us; the ranks' word comes every few seconds.
STALL_FACTOR, LEAST_STALL_S = 10.0, 120.0
# Until every rank has said a first word: importing torch from a slow disk takes minutes.
START_S = 900.0
POLL_S = 0.1
# How long a rank has to write them, which it does even while it computes or waits in C code.
STACKS_S = 10.0
# Innermost calls of each rank that a message shows.
NUM_CALLS = 6
STACKS_SIGNAL = signal.SIGUSR2


def stall_bound(longest_step_s: float) -> float:
    """Seconds without progress of any rank after which a program whose longest step is forecast so is stuck.

    Ten times the forecast, at least two minutes: waiting longer costs a stuck run minutes, less a slow one everything.
    """
    return max(LEAST_STALL_S, STALL_FACTOR * longest_step_s)


class Ranks:
    """What the ranks said of themselves, and when one of them last got on."""

    def __init__(self, num_ranks: int):
        self.num_ranks = num_ranks
        self.pids: dict[int, int] = {}
        self.said: dict[int, dict[str, Any]] = {}
        self.progress_at = time.monotonic()

    def hear(self, event: dict[str, Any]) -> None:
        """Any event is progress, but that a rank is alive is only when it made a step since it last said so."""
        rank = event["rank"]
        if event["event"] == "started":
            self.pids[rank] = event["pid"]
        if event["event"] != "alive" or event["step"] != self.said.get(rank, {}).get("step"):
            self.progress_at = time.monotonic()
        self.said[rank] = {**self.said.get(rank, {}), **event}

    def idle_s(self) -> float:
        return time.monotonic() - self.progress_at

    def where(self, stacks: dict[int, str]) -> str:
        """Which rank is where: its step, what it says it does, and the innermost calls of its main thread."""
        lines = []
        for rank in range(self.num_ranks):
            said = self.said.get(rank, {})
            if rank not in self.pids:
                lines.append(f"rank {rank}: never started")
                continue
            lines.append(f"rank {rank}: step {said.get('step', 0)}, {said.get('doing') or 'joining the group'}")
            lines += main_thread(stacks.get(rank, "")) or ["  (no stack: it does not answer)"]
        return "\n".join(lines)


def main_thread(stacks: str) -> list[str]:
    """The innermost calls of the main thread, which faulthandler prints last, innermost first."""
    threads = re.split(r"^(?:Current thread|Thread) 0x.*$", stacks, flags=re.MULTILINE)
    calls = [line for line in without_places(threads[-1]).splitlines() if line.startswith("  File")]
    return calls[:NUM_CALLS]


def stacks_path(events: pathlib.Path, rank: int) -> pathlib.Path:
    """Where a rank's faulthandler writes the stacks of its threads at STACKS_SIGNAL."""
    return events.with_suffix(f".{rank}.stacks")


def take_stacks(ranks: Ranks, events: pathlib.Path) -> dict[int, str]:
    """The stacks of every rank's threads, by rank; a rank that is gone, or does not answer in time, has none."""
    for pid in ranks.pids.values():
        try:
            os.kill(pid, STACKS_SIGNAL)
        except ProcessLookupError:
            continue
    paths = {rank: stacks_path(events, rank) for rank in ranks.pids}
    deadline = time.monotonic() + STACKS_S
    while not all(path.stat().st_size for path in paths.values()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    time.sleep(POLL_S)  # the rest of the last one
    return {rank: path.read_text(encoding="utf-8", errors="replace") for rank, path in paths.items()}


def watch(
    process: subprocess.Popen,
    events: pathlib.Path,
    progress: Progress,
    num_ranks: int,
    num_points: int,
    stall_s: float,
) -> str | None:
    """Follow the events until the program ends; returns what went wrong, or None.

    A program of which no rank got on for `stall_s` seconds (until all have started START_S more) has gone wrong: the
    answer then says where each rank is. Ending it is the caller's.
    """
    ranks, tail, finished = Ranks(num_ranks), Tail(events), 0
    failures: list[str] = []
    while True:
        ended = process.poll() is not None
        for event in tail.new():
            ranks.hear(event)
            if event["rank"] == 0:
                progress.show(event)
            if event["event"] == "failed":
                failures.append(f"rank {event['rank']}: {event['error']}")
            finished += event["event"] == "point"
        if ended:
            if process.returncode != 0:
                cause = f" ({failures[0]})" if failures else ""
                return f"ended with status {process.returncode} after {finished} of {num_points} points{cause}"
            return None if finished == num_points else f"ended after {finished} of {num_points} points"
        bound = stall_s + (START_S if len(ranks.pids) < num_ranks else 0)
        if ranks.idle_s() > bound:
            return (
                f"made no progress on any rank for {bound:.0f} s, after {finished} of {num_points} points, and was "
                f"stopped. The ranks, innermost call first (all threads: {events.stem}.*.stacks beside the log):\n"
                f"{ranks.where(take_stacks(ranks, events))}\n"
            )
        time.sleep(POLL_S)
