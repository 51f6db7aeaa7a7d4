"""Time several ways of doing the same ("arms") against each other, on all ranks of a group at once.

Arms are interleaved in random blocks within one process, so drift of clocks and neighbours hits all of them alike. What
an arm's `prepare` does (restoring data that a run changes) and the barrier before each sample stay outside the timed
region. How a sample is taken (`Timing.timing`):

    graph      GPU, protocol "device": CUDA events around the replay of a CUDA graph of `repeats` runs of the arm
    backlog    the same around the runs issued eagerly, where the arm cannot be captured or is not to be
    host       CPU: the host's clock around one run. Protocol "published": the same on a GPU, with a synchronisation of
               the host before and after, as the published study did; the first run of each block warms up

The first two are issued behind a kernel that keeps the GPU busy until the host has issued the whole block, so no host
is in the loop, and the SMs' clock is read around each sample, before its barrier and after its end. Caches are as
`prepare` and the previous sample left them (warm).

Each run that is waited for is told to the logger of this module (DEBUG): whoever watches a measurement can tell a slow
one from a stuck one.
"""

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from maco_lib.clock import ClockReadings, lowest_mhz
from maco_lib.stats import median_interval, num_samples

LOG = logging.getLogger(__name__)
PROTOCOLS = ("device", "published")
# A replay takes some µs to start, whatever is in it: it is filled with runs until they take much longer. Not with more
# than so many, as a run may sum in place.
MIN_REPLAY_US = 1000.0
MAX_REPEATS = 32
# Replays issued behind one backlog: what is launched must fit in the GPU's queue of about a thousand. An eager run, of
# some fifteen launches and waits, counts twice.
MAX_BURST = 40
SLEEP_CYCLES_PER_US = 2000


@dataclass(frozen=True)
class Arm:
    """A way of doing something. `run` is timed; `prepare`, before each sample, is not. Both use the current stream.

    check(again): what is wrong on this rank with what timed runs leave, or "". Called once, after all samples of all
    arms; `again()` takes a sample that does not count, in the way in which the others were taken, with all ranks.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] | None = None
    check: Callable[[Callable[[], object]], str] | None = None


@dataclass(frozen=True)
class Timing:
    """Samples of one arm. `values[rank][iteration]` in µs of one run; `blocks[iteration]` is the block of the sample.

    `repeats`: runs in each sample, whose mean it is. `num_late`: samples that the host issued late (backlog ran out).
    `clocks[rank][iteration]`: the mean SM clock of each sample in MHz; no iterations where the host's clock timed them.
    `error`: what the arm's check found, the same on every rank, or "".
    """

    values: list[list[float]]
    blocks: list[int]
    timing: str
    repeats: int = 1
    num_late: int = 0
    clocks: list[list[float]] = field(default_factory=list)
    error: str = ""

    @property
    def clock_mhz(self) -> float:
        """Median over the iterations of the lowest clock of any rank, for which the group waits; NaN: none was read."""
        return lowest_mhz(self.clocks)

    @property
    def slowest(self) -> np.ndarray:
        """Per iteration the maximum over the ranks, in µs: the group is done when its last rank is."""
        return np.max(self.values, axis=0)


def median_us(timing: Timing) -> float:
    """Of the slowest rank in every run."""
    return median_interval(timing.slowest)[0]


def gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's `value`, by rank, on every rank."""
    if group is None:
        return [value]
    values = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def first_error(error: str, group: dist.ProcessGroup | None) -> str:
    """The same verdict on every rank: the first rank's error that is not empty, or ""."""
    return first_of(gather(error, group))


def first_of(errors: Sequence[str]) -> str:
    """Of the ranks' errors, by rank, the first that is not empty, or ""."""
    return next((f"rank {rank}: {text}" for rank, text in enumerate(errors) if text), "")


def decided(value: Any, group: dist.ProcessGroup | None) -> Any:
    """Rank 0's `value` on every rank."""
    return gather(value, group)[0]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    arms: Sequence[Arm],
    *,
    group: dist.ProcessGroup | None,
    device: torch.device,
    protocol: str = "device",
    iterations: int | None = None,
    budget_s: float = 1.0,
    min_iterations: int = 5,
    max_iterations: int = 200,
    num_blocks: int = 10,
    warmup: int = 2,
    captured: bool = True,
) -> dict[str, Timing]:
    """Time `arms` interleaved; every rank of `group` (None: this process alone) calls it with the same arguments.

    iterations: samples of each arm, rounded up to whole blocks; None: as many as fit into `budget_s` seconds, between
    `min_iterations` and `max_iterations`; where `min_iterations` would take many times that, fewer (`num_samples`).
    Rank 0 decides it and the order of the arms in each block. warmup: runs before, one where it takes longer than
    `budget_s`. captured: a GPU replays CUDA graphs of the arms where it can; False: it never does, the runs are issued
    as eager code does. Returns, on every rank, arm name -> `Timing`. Raises ValueError on an unknown protocol, repeated
    names or counts below 1.
    """
    check_request(arms, protocol, iterations, min_iterations, max_iterations, num_blocks, warmup)
    on_device = protocol == "device" and device.type == "cuda"
    # The study repeated one arm alone; right after another one a run takes up to a sixth longer by the host's clock.
    num_discarded = int(protocol == "published")
    estimates_us = {arm.name: estimate_us(arm, warmup, budget_s, group, device) for arm in arms}
    samplers = {}
    for arm in arms:
        if on_device:
            samplers[arm.name] = DeviceSampler(arm, estimates_us[arm.name], group, device, captured)
        else:
            samplers[arm.name] = HostSampler(arm, estimates_us[arm.name], group, device, num_discarded)
    if iterations is None:
        round_us = sum(sampler.repeats * sampler.about_us for sampler in samplers.values())
        iterations = decided(num_samples(budget_s * 1e6 / round_us, min_iterations, max_iterations), group)
    num_blocks = min(num_blocks, iterations)
    per_block = -(-iterations // num_blocks)
    shuffler = random.Random(decided(random.getrandbits(32), group))
    mine: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for _ in range(num_blocks):
        for arm in shuffler.sample(list(arms), len(arms)):
            mine[arm.name] += samplers[arm.name].sample(per_block)
    blocks = np.repeat(np.arange(num_blocks), per_block).tolist()
    late = {name: sampler.num_late for name, sampler in samplers.items()}
    read = {name: list(sampler.clocks) for name, sampler in samplers.items()}
    errors = {arm.name: arm.check(partial(samplers[arm.name].sample, 1)) if arm.check else "" for arm in arms}
    results = {}
    every_rank = gather({name: (mine[name], late[name], read[name], errors[name]) for name in mine}, group)
    for name, sampler in samplers.items():
        values, num_late, clocks, found = zip(*(of_rank[name] for of_rank in every_rank), strict=True)
        facts = sampler.timing, sampler.repeats, max(num_late), [*clocks], first_of(found)
        results[name] = Timing([*values], blocks, *facts)
        sampler.close()
    return results


def check_request(arms, protocol, iterations, min_iterations, max_iterations, num_blocks, warmup) -> None:
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; the protocols are {', '.join(PROTOCOLS)}")
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"arms need names of their own, got {names}")
    counts = {"min_iterations": min_iterations, "num_blocks": num_blocks, "warmup": warmup}
    counts["iterations"] = min_iterations if iterations is None else iterations
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} = {count} is below 1")
    if max_iterations < min_iterations:
        raise ValueError(f"max_iterations = {max_iterations} is below min_iterations = {min_iterations}")


def estimate_us(arm: Arm, warmup: int, budget_s: float, group: dist.ProcessGroup | None, device: torch.device) -> float:
    """Warm the arm up and return about how long a run takes on the slowest rank, in µs; the same on every rank."""
    slowest_us = 0.0
    for _ in range(warmup):
        if slowest_us > budget_s * 1e6:
            break
        if arm.prepare:
            arm.prepare()
        synchronize(device)
        begin = time.perf_counter()
        arm.run()
        synchronize(device)
        elapsed_us = (time.perf_counter() - begin) * 1e6
        LOG.debug("%s: warmed up in %.0f us", arm.name, elapsed_us)
        slowest_us = max(gather(elapsed_us, group))
    return slowest_us


class Barrier:
    """All ranks arrive before any goes on: the host on a CPU, the current stream on a GPU."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device):
        self.group = group
        self.token = torch.zeros(1, device=device)

    def __call__(self) -> None:
        if self.group is not None:
            dist.all_reduce(self.token, group=self.group)


class HostSampler:
    """The host's clock around each run; the first `num_discarded` runs of a block are not samples."""

    timing, repeats, num_late = "host", 1, 0

    def __init__(
        self, arm: Arm, about_us: float, group: dist.ProcessGroup | None, device: torch.device, num_discarded: int
    ):
        self.arm, self.about_us = arm, about_us
        self.device = device
        self.num_discarded = num_discarded
        self.clocks: list[float] = []
        self.barrier = Barrier(group, device)

    def sample(self, count: int) -> list[float]:
        values = []
        for _ in range(self.num_discarded + count):
            if self.arm.prepare:
                self.arm.prepare()
            self.barrier()
            synchronize(self.device)
            begin = time.perf_counter()
            self.arm.run()
            synchronize(self.device)
            values.append((time.perf_counter() - begin) * 1e6)
            LOG.debug("%s: %.0f us", self.arm.name, values[-1])
        return values[self.num_discarded :]

    def close(self) -> None:
        """Nothing to release."""


class DeviceSampler:
    """CUDA events around graph replays (or eager runs) that wait behind a backlog.

    about_us: of an eager run, which may take the host longer than the GPU; of a replay of one run, if it is replayed.
    """

    def __init__(
        self, arm: Arm, about_us: float, group: dist.ProcessGroup | None, device: torch.device, captured: bool
    ):
        self.arm, self.about_us = arm, about_us
        self.group, self.device = group, device
        self.barrier = Barrier(group, device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.repeats, self.num_late = 1, 0
        self.backlog_us = self.issue_us = 0.0
        self.clocks: list[float] = []
        replayed = captured and self.capture(1)
        if replayed:
            self.warm_up()
            self.about_us = max(gather(float(np.median(self.burst(3))), group))
            if self.fitting() > 1:
                replayed = self.capture(self.fitting())
                self.warm_up()
        if replayed:
            self.timing, self.max_burst = "graph", MAX_BURST
        else:
            self.timing, self.repeats = "backlog", self.fitting()
            self.max_burst = max(1, MAX_BURST // (2 * self.repeats))
            self.warm_up()
        self.num_late = 0
        self.clocks.clear()

    def fitting(self) -> int:
        """How many runs make a sample; the same on every rank, as `about_us` is."""
        return min(MAX_REPEATS, max(1, round(MIN_REPLAY_US / self.about_us)))

    def capture(self, repeats: int) -> bool:
        """Replay so many runs from now on; False, and none, where some rank cannot capture them."""
        self.close()
        graph, why = capture(self.arm.run, repeats)
        self.graph, self.repeats = (None if first_error(why, self.group) else graph), repeats
        return self.graph is not None

    def warm_up(self) -> None:
        """Two bursts without backlog; the second shows how long the host takes to issue a sample."""
        self.backlog_us = 0.0
        self.burst(2)
        self.burst(4)
        self.backlog_us = 2 * max(gather(self.issue_us, self.group))

    def sample(self, count: int) -> list[float]:
        values = []
        while len(values) < count:
            values += self.burst(min(self.max_burst, count - len(values)))
        return values

    def burst(self, count: int) -> list[float]:
        begins = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
        readings = ClockReadings(count, self.device)
        torch.cuda._sleep(int(self.backlog_us * count * SLEEP_CYCLES_PER_US))
        issued = time.perf_counter()
        for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            if self.arm.prepare:
                self.arm.prepare()
            self.barrier()  # so that no wait for another rank is between the readings of the clock
            readings.before(number)
            self.barrier()
            begin.record()
            if self.graph is not None:
                self.graph.replay()
            else:
                for _ in range(self.repeats):
                    self.arm.run()
            end.record()
            readings.after(number)
        self.issue_us = (time.perf_counter() - issued) * 1e6 / count
        self.num_late += sum(begin.query() for begin in begins)
        torch.cuda.synchronize(self.device)
        LOG.debug("%s: %d samples", self.arm.name, count)
        self.clocks += readings.mhz()
        return [begin.elapsed_time(end) * 1e3 / self.repeats for begin, end in zip(begins, ends, strict=True)]

    def close(self) -> None:
        """Release the graph: it must be gone before its communicator is."""
        if self.graph is not None:
            self.graph.reset()
            self.graph = None


def capture(run: Callable[[], object], repeats: int) -> tuple[torch.cuda.CUDAGraph | None, str]:
    """A CUDA graph of `repeats` runs, or None and why it could not be captured."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads (NCCL's watchdog) may go on calling CUDA while this one captures.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(repeats):
                run()
    except RuntimeError as error:
        return None, str(error)
    return graph, ""
