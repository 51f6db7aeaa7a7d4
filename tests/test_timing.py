"""The timing primitives, on this process alone and on two ranks."""

import math
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from maco_lib import timing
from maco_lib.clock import lowest_mhz, mean_clock_mhz
from maco_lib.stats import LEAST_SAMPLES
from maco_lib.timing import Arm, Timing, interleave

CPU = torch.device("cpu")


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_samples_are_times_of_run_alone_in_microseconds():
    """A busy host makes a run longer, so what each took by its own clock is what is compared."""
    taken_us: dict[str, list[float]] = {"slow": [], "fast": []}

    def timed(name: str, seconds: float) -> None:
        begin = time.perf_counter()
        spin(seconds)
        taken_us[name].append((time.perf_counter() - begin) * 1e6)

    arms = [Arm("slow", lambda: timed("slow", 4e-3), lambda: spin(2e-3)), Arm("fast", lambda: timed("fast", 1e-3))]
    timings = interleave(arms, group=None, device=CPU, iterations=12, num_blocks=4)
    assert [len(timing.values[0]) for timing in timings.values()] == [12, 12]
    assert timings["slow"].blocks == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for name in taken_us:
        assert np.median(timings[name].slowest) == pytest.approx(np.median(taken_us[name][-12:]), rel=0.1)
    assert timings["slow"].timing == "host"
    assert timings["slow"].clocks == [[]] and math.isnan(timings["slow"].clock_mhz)


def test_arms_are_interleaved_and_prepared_before_every_sample():
    calls = []
    arms = [Arm(name, lambda name=name: calls.append(name), lambda: calls.append("prepare")) for name in "abc"]
    interleave(arms, group=None, device=CPU, iterations=40, num_blocks=20, warmup=1)
    assert calls[::2] == ["prepare"] * (len(calls) // 2)
    order = calls[1::2][3:]
    blocks = ["".join(order[start : start + 6 : 2]) for start in range(0, len(order), 6)]
    assert len(blocks) == 20 and {frozenset(block) for block in blocks} == {frozenset("abc")}
    assert len(set(blocks)) > 1


def test_what_is_timed_is_checked_in_the_end_by_samples_of_its_own():
    calls = []

    def check(again):
        before = len(calls)
        again()
        assert calls[before:] == ["prepare", "arm"]
        return "it left nothing"

    arms = [Arm("arm", lambda: calls.append("arm"), lambda: calls.append("prepare"), check), Arm("other", lambda: None)]
    timings = interleave(arms, group=None, device=CPU, iterations=12, num_blocks=4)
    assert timings["arm"].error == "rank 0: it left nothing" and timings["other"].error == ""
    assert [len(timing.values[0]) for timing in timings.values()] == [12, 12]


def test_the_published_protocol_does_not_count_a_run_after_another_arm():
    calls = []
    arms = [Arm(name, lambda name=name: (spin(3e-3 if calls[-1:] != [name] else 1e-3), calls.append(name)))
            for name in "ab"]  # fmt: skip
    request = {"group": None, "device": CPU, "iterations": 12, "num_blocks": 4, "warmup": 1}
    published = interleave(arms, protocol="published", **request)
    assert [len(timing.values[0]) for timing in published.values()] == [12, 12]

    def slowest() -> float:
        return max(max(timing.slowest) for timing in interleave(arms, protocol="published", **request).values())

    # Other processes lengthen a run now and then; one after another arm would take 3 ms in every attempt.
    assert any(slowest() < 2900 for _ in range(20))
    assert max(interleave(arms, **request)["a"].slowest) > 2900


def test_the_budget_decides_the_iterations_within_their_bounds():
    def count(**request) -> int:
        timings = interleave([Arm("arm", lambda: spin(1e-3))], group=None, device=CPU, **request)
        return len(timings["arm"].values[0])

    assert 10 <= count(budget_s=0.03, max_iterations=1000) <= 50
    # Six fit at most: the fewest asked for are taken, though they take longer, but not many times longer.
    assert count(budget_s=0.0065, min_iterations=7, num_blocks=7) == 7
    assert count(budget_s=1e-6, min_iterations=7, num_blocks=7) == LEAST_SAMPLES
    assert count(budget_s=10.0, max_iterations=20) == 20


def ranks_that_differ(rank: int, num_ranks: int) -> None:
    order = []
    arms = [Arm(name, lambda name=name: (order.append(name), spin(1e-3 * (1 + 4 * rank)))) for name in ("a", "b", "c")]
    timings = interleave(arms, group=dist.group.WORLD, device=CPU, budget_s=0.05, min_iterations=8)
    orders, counts = [None] * num_ranks, [None] * num_ranks
    dist.all_gather_object(orders, order)
    dist.all_gather_object(counts, [len(timings[name].values[0]) for name in "abc"])
    assert orders[0] == orders[1] and counts[0] == counts[1] and len(set(counts[0])) == 1
    assert min(timings["a"].values[0]) < 2500 < 4900 < min(timings["a"].slowest)


def test_ranks_agree_on_counts_and_order_and_the_slowest_rank_counts():
    run_ranks(ranks_that_differ)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"protocol": "host"}, "'host'.*device, published"),
        ({"iterations": 0}, "iterations = 0"),
        ({"num_blocks": 0}, "num_blocks = 0"),
        ({"min_iterations": 9, "max_iterations": 3}, "max_iterations = 3"),
    ],
)
def test_bad_requests_are_named(request_, message):
    with pytest.raises(ValueError, match=message):
        interleave([Arm("arm", lambda: None)], group=None, device=CPU, **request_)
    with pytest.raises(ValueError, match="names of their own"):
        interleave([Arm("twin", lambda: None)] * 2, group=None, device=CPU)


def test_the_clock_is_that_of_the_sms_seen_both_times():
    # SMs 0 and 3 at 1500 MHz, SM 1 at 1400, SM 2 only before, SM 4 only after, SM 5 never; counters begin anywhere.
    before = np.array([[7, 10_000], [2**40, 10_032], [9, 10_000], [5, 10_000], [0, 0], [0, 0]])
    after = np.array([[300_007, 210_000], [2**40 + 280_000, 210_032], [0, 0], [300_005, 210_000], [8, 210_000], [0, 0]])
    assert mean_clock_mhz(before, after) == 1500
    assert mean_clock_mhz(before[1:3], after[1:3]) == 1400
    assert math.isnan(mean_clock_mhz(before[4:], after[4:]))


def test_a_timing_has_the_clock_of_the_rank_that_the_others_wait_for():
    clocks = [[1500.0, 1400.0, 1600.0, math.nan], [1450.0, 1700.0, 1650.0, 1200.0]]
    assert Timing([[1.0] * 4] * 2, [0, 1, 2, 3], "graph", clocks=clocks).clock_mhz == 1450
    assert math.isnan(lowest_mhz([[math.nan], [1500.0]]))


class HostEvent:
    def __init__(self, enable_timing: bool):
        self.at = math.nan

    def record(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return False

    def elapsed_time(self, end: "HostEvent") -> float:
        return (end.at - self.at) * 1e3


class HostGraph:
    """A replay takes 50 us to start, and a run in it 12.5 us."""

    def __init__(self, repeats: int):
        self.repeats = repeats

    def replay(self) -> None:
        spin(50e-6 + self.repeats * 12.5e-6)

    def reset(self) -> None:
        """Nothing is held."""


class NoReadings:
    def __init__(self, count: int, device: torch.device):
        self.before = self.after = lambda number: None
        self.mhz = list


def test_a_replay_is_filled_by_what_a_run_takes_in_it_not_by_what_the_host_takes_to_issue_one(monkeypatch):
    recorded = []
    monkeypatch.setattr(timing, "capture", lambda run, repeats: (recorded.append(repeats), (HostGraph(repeats), ""))[1])
    monkeypatch.setattr(timing, "Barrier", lambda group, device: lambda: None)
    monkeypatch.setattr(timing, "ClockReadings", NoReadings)
    for name, instead in (("Event", HostEvent), ("_sleep", lambda cycles: None), ("synchronize", lambda device: None)):
        monkeypatch.setattr(torch.cuda, name, instead)
    arms = [Arm("arm", lambda: spin(3e-3))]
    request = {"group": None, "device": torch.device("cuda"), "iterations": 8, "num_blocks": 2}
    short = interleave(arms, **request)["arm"]
    # Alone in a replay a run takes 62.5 us.
    assert short.timing == "graph" and recorded == [1, short.repeats] and 12 <= short.repeats <= 16
    assert np.median(short.slowest) == pytest.approx(50 / short.repeats + 12.5, rel=0.2)
    eager = interleave(arms, captured=False, **request)["arm"]
    assert (eager.timing, eager.repeats) == ("backlog", 1) and np.median(eager.slowest) > 2900


@pytest.mark.gpu(num_gpus=1)
def test_a_gpu_arm_is_timed_by_graph_replays_and_agrees_with_the_host_clock():
    device = torch.device("cuda", 0)
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    arms = [Arm("matmul", lambda: torch.mm(a, a, out=out))]
    graph = interleave(arms, group=None, device=device, budget_s=0.2)["matmul"]
    host = interleave(arms, group=None, device=device, budget_s=0.2, protocol="published")["matmul"]
    eager = interleave(arms, group=None, device=device, budget_s=0.2, captured=False)["matmul"]
    assert (graph.timing, host.timing) == ("graph", "host")
    assert graph.num_late == 0
    # A sample is filled to half a run: the replay's by its own time, the eager one's by the host's, which is longer.
    assert 0.85 < graph.repeats * np.median(graph.slowest) / timing.MIN_REPLAY_US < 1.15
    assert eager.timing == "backlog" and graph.repeats - 2 <= eager.repeats <= graph.repeats
    assert 0.9 < min(eager.slowest) / min(graph.slowest) < 1.1
    assert 0.5 < min(graph.slowest) / min(host.slowest) < 1.05
    assert len(graph.clocks[0]) == len(graph.values[0]) and host.clocks == [[]]
    assert 200 < min(graph.clocks[0]) <= max(graph.clocks[0]) < 3000


@pytest.mark.gpu(num_gpus=1)
def test_the_clock_of_a_spin_is_read_on_every_sm():
    from maco_lib.clock import ClockReadings

    device = torch.device("cuda", 0)
    readings, cycles = ClockReadings(2, device), 4_000_000
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for sample in range(2):
        readings.before(sample)
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        readings.after(sample)
    clock = readings.mhz()[1]
    assert 200 < clock < 3000
    assert clock == pytest.approx(cycles / begin.elapsed_time(end) / 1e3, rel=0.05)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    assert (readings.readings[..., 1] > 0).sum(-1).tolist() == [[num_sms] * 2] * 2
