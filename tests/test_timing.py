"""The timing primitives, on this process alone and on two ranks."""

import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from maco_lib.timing import Arm, interleave

CPU = torch.device("cpu")


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_samples_are_times_of_run_alone_in_microseconds():
    arms = [Arm("slow", lambda: spin(4e-3), lambda: spin(2e-3)), Arm("fast", lambda: spin(1e-3))]
    timings = interleave(arms, group=None, device=CPU, iterations=12, num_blocks=4)
    assert [len(timing.values[0]) for timing in timings.values()] == [12, 12]
    assert timings["slow"].blocks == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert min(timings["slow"].slowest) == pytest.approx(4000, rel=0.1)
    assert min(timings["fast"].slowest) == pytest.approx(1000, rel=0.1)
    assert timings["slow"].timing == "host"


def test_arms_are_interleaved_and_prepared_before_every_sample():
    calls = []
    arms = [Arm(name, lambda name=name: calls.append(name), lambda: calls.append("prepare")) for name in "abc"]
    interleave(arms, group=None, device=CPU, iterations=40, num_blocks=20, warmup=1)
    assert calls[::2] == ["prepare"] * (len(calls) // 2)
    order = calls[1::2][3:]
    blocks = ["".join(order[start : start + 6 : 2]) for start in range(0, len(order), 6)]
    assert len(blocks) == 20 and {frozenset(block) for block in blocks} == {frozenset("abc")}
    assert len(set(blocks)) > 1


def test_the_published_protocol_does_not_count_a_run_after_another_arm():
    calls = []
    arms = [Arm(name, lambda name=name: (spin(3e-3 if calls[-1:] != [name] else 1e-3), calls.append(name)))
            for name in "ab"]  # fmt: skip
    request = {"group": None, "device": CPU, "iterations": 12, "num_blocks": 4, "warmup": 1}
    published = interleave(arms, protocol="published", **request)
    assert [len(timing.values[0]) for timing in published.values()] == [12, 12]
    assert max(max(timing.slowest) for timing in published.values()) < 2900
    assert max(interleave(arms, **request)["a"].slowest) > 2900


def test_the_budget_decides_the_iterations_within_their_bounds():
    def count(**request) -> int:
        timings = interleave([Arm("arm", lambda: spin(1e-3))], group=None, device=CPU, **request)
        return len(timings["arm"].values[0])

    assert 10 <= count(budget_s=0.03, max_iterations=1000) <= 50
    assert count(budget_s=1e-6, min_iterations=7, num_blocks=7) == 7
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


@pytest.mark.gpu(num_gpus=1)
def test_a_gpu_arm_is_timed_by_graph_replays_and_agrees_with_the_host_clock():
    device = torch.device("cuda", 0)
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    arms = [Arm("matmul", lambda: torch.mm(a, a, out=out))]
    graph = interleave(arms, group=None, device=device, budget_s=0.2)["matmul"]
    host = interleave(arms, group=None, device=device, budget_s=0.2, protocol="published")["matmul"]
    assert (graph.timing, host.timing) == ("graph", "host")
    assert graph.num_late == 0
    assert 0.5 < min(graph.slowest) / min(host.slowest) < 1.05
