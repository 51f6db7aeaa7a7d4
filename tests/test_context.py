"""A context as a user meets it: what it prepares, that it is let go of, and that a graph can be captured at once."""

import gc
import os
import subprocess
import sys
import time
import weakref

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from ranks import ROOT, run_ranks

from maco_lib import context as contexts
from maco_lib import state as states
from maco_lib import timing
from maco_lib import turns as turns_module
from maco_lib.comm import watch
from maco_lib.kernels.patience import code
from maco_lib.overlap import LinearPlan, Plan, linear_all_reduce, linear_all_reduce_norm, overlap

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MACO_CACHE", str(tmp_path))


def prepared(rank: int, num_ranks: int) -> None:
    """After `prepare` no call talks to the other ranks on the host, whatever form it has; after `close` one does."""
    context, generator = contexts.of(None, CPU), torch.Generator().manual_seed(rank)
    weight, other = (torch.randn(n, 64, generator=generator) for n in (96, 32))
    with pytest.raises(ValueError, match="num_rows = \\[0\\] of prepare"):
        context.prepare([weight], [0])
    context.prepare([weight, other], [3, 200])
    talks, gathered = [], dist.all_gather_object
    dist.all_gather_object = lambda *rest, **options: (talks.append(1), gathered(*rest, **options))[1]
    for its_weight in (weight, other, weight.clone()):
        n = len(its_weight)
        for num_rows in (3, 200):
            x = torch.randn(num_rows, 64, generator=generator)
            bias, residual = torch.ones(n), torch.full((num_rows, n), 2.0)
            expected = x @ its_weight.t()
            dist.all_reduce(expected)
            for its_bias in (None, bias):
                for its_residual in (None, residual):
                    wanted = expected + (0 if its_bias is None else 1) + (0 if its_residual is None else 2)
                    found = linear_all_reduce(x, its_weight, its_bias, its_residual)
                    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
            normed, total = linear_all_reduce_norm(x, its_weight, residual, torch.ones(n))
            torch.testing.assert_close(total, expected + 2, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                normed, torch.nn.functional.rms_norm(total, (n,), eps=1e-6), rtol=1e-3, atol=1e-3
            )
    assert not talks
    context.close()
    assert states.of(None, CPU) is not context.state and not states.of(None, CPU).made
    linear_all_reduce(x, weight)
    assert talks


def test_what_is_prepared_makes_nothing(cache):
    run_ranks(prepared)


def let_go(rank: int, num_ranks: int) -> None:
    group = dist.new_group()
    x = torch.ones(2, 4)
    overlap(lambda: None, x, group=group, plan=Plan())
    overlap(lambda: None, x, group=group, plan=Plan())
    assert (x == num_ranks**2).all()
    context = weakref.ref(states.of(group, CPU))
    linear_all_reduce(x, torch.ones(3, 4), group=group, plan=None)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert context() is None


def test_a_context_goes_with_its_group():
    run_ranks(let_go)


def host_cost(rank: int, num_ranks: int) -> None:
    from study.harness.worker import Context
    from study.sections.linear_all_reduce import measure_host_cost as linear_all_reduce_host_cost
    from study.sections.linear_all_reduce.section import HOST_COST

    point = {"layer": "Qwen3-8B o_proj", "m": 4, "n": 64, "k": 128, "dtype": "bf16", "num_rounds": 10}
    found = linear_all_reduce_host_cost.measure(point, Context(rank, num_ranks, CPU, dist.group.WORLD, ROOT))
    rows = pd.DataFrame(found.rows).assign(point_key="", num_launches=1)
    HOST_COST.schema.validate(rows)
    assert not rows.duplicated(list(HOST_COST.index)).any()
    assert rows["correct"].all() and len(rows) == 5 and sum(rows["prepared"]) == 3
    assert (rows["host_lo_us"] <= rows["host_us"]).all() and (rows["ratio"] <= rows["ratio_hi"]).all()


def test_what_calls_cost_the_host_is_measured_beside_the_same_by_hand(cache):
    run_ranks(host_cost)


class Recorded:
    """A stream or an event that tells what was done with it."""

    def __init__(self, name: str, told: list[str]):
        self.name, self.told, self.cuda_stream = name, told, name

    def wait_event(self, event) -> None:
        self.told.append(f"{self.name} waits for {event.of}")

    def record(self, stream) -> None:
        self.of = stream.name


def test_streams_take_turns_as_they_are_issued(monkeypatch):
    told, captures, now = [], {}, []
    streams = {handle: Recorded(name, told) for handle, name in ((1, "first"), (2, "second"))}
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: now[-1], raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[now[-1]])
    monkeypatch.setattr(torch.cuda, "Event", lambda: Recorded("event", told))
    monkeypatch.setattr(turns_module, "stream_of", lambda handle, device: streams[handle])
    monkeypatch.setattr(turns_module, "capture_of", lambda stream: captures.get(stream.name, 0))
    turns = turns_module.Turns(torch.device("cuda", 0))

    def turn(handle: int) -> list[str]:
        told.clear()
        now.append(handle)
        turns.take()
        turns.give()
        return list(told)

    assert turn(1) == turn(1) == []
    assert turn(2) == ["second waits for first"] and turn(2) == []
    assert turn(1) == ["first waits for second"]
    captures["second"] = 1  # it waits for nothing that was issued before the capture
    assert turn(2) == []
    captures.clear()  # and nothing waits for what was captured
    assert turn(1) == [] and turn(2) == ["second waits for first"]
    captures.update(first=2, second=2)
    assert turn(2) == [] and turn(1) == ["first waits for second"]
    captures.update(first=3, second=3)  # another capture: of the one before nothing is in it
    assert turn(2) == [] and turn(1) == ["first waits for second"]


def test_a_rank_that_did_not_come_is_named(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *shape, pin_memory, **options: torch.empty(*shape, **options).zero_())
    monkeypatch.setenv("MACO_WAIT_S", "2.5")
    group = type("Group", (), {"group_name": "tp"})()
    context = states.State(group, torch.device("cuda", 0))
    monkeypatch.setattr(context, "turns", turns_module.Turns(context.device))
    made = watch.Watch(context)
    assert made.view[0] == 2_500_000_000
    context.turns.check()
    made.view[1] = code("ll128", 3)
    with pytest.raises(RuntimeError, match="rank 3 of group 'tp' did not come.*'ll128' on cuda:0 waited.*2.5 s"):
        context.turns.check()


# -- on GPUs -----------------------------------------------------------------------------------------------------------

INNER = {
    "two_shot": LinearPlan("sequential", "symm_mem_two_shot"),
    "push_64": LinearPlan("sequential", "maco_push_64"),
    "ll128": LinearPlan("sequential", "maco_ll128"),
    "decode": LinearPlan("decode"),
    "persistent": LinearPlan("persistent"),
}
OUTER = ("nccl", "symm_mem_two_shot", "maco_push_64", "maco_ll128")
NUM_TURNS = 25


def off(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return not float((found.double() - expected).norm() / expected.norm()) < 0.02


def operands(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight and their product, summed."""
    generator = torch.Generator(f"cuda:{rank}").manual_seed(rank)
    x, weight = (torch.randn(m, 1024, generator=generator, device=f"cuda:{rank}").bfloat16() for m in (64, 2048))
    expected = x.double() @ weight.double().t()
    dist.all_reduce(expected)
    return x, weight, expected


def nested(rank: int, num_ranks: int) -> None:
    """A linear_all_reduce inside the compute of an overlap, over the same flags and memory, the host far ahead."""
    x, weight, expected = operands(rank)
    gradient = torch.randn(2**20, device=x.device).bfloat16()
    total = gradient.double()
    dist.all_reduce(total)
    for name, inner in INNER.items():
        for backend in OUTER:
            for outer in (Plan(backend, urgent=False, leads=True), Plan(backend), Plan(backend, compute_first=True)):
                linear_all_reduce(x, weight, plan=inner)
                overlap(lambda: None, gradient.clone(), plan=outer)
                torch.cuda.synchronize()
                torch.cuda._sleep(20_000_000)
                wrong = []
                for _ in range(NUM_TURNS):
                    mine = gradient.clone()
                    y, _ = overlap(lambda inner=inner: linear_all_reduce(x, weight, plan=inner), mine, plan=outer)
                    wrong.append((y, mine))
                torch.cuda.synchronize()
                assert not any(off(y, expected) or off(mine, total) for y, mine in wrong), (name, outer)


def from_two_streams(rank: int, num_ranks: int) -> None:
    x, weight, expected = operands(rank)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for name, plan in INNER.items():
        linear_all_reduce(x, weight, plan=plan)
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)
        found = []
        for turn in range(NUM_TURNS):
            for stream in streams:
                with torch.cuda.stream(stream):
                    found.append((linear_all_reduce(x * (1 + turn % 3), weight, plan=plan), 1 + turn % 3))
        torch.cuda.synchronize()
        assert not any(off(y, expected * factor) for y, factor in found), name


def captured_at_once(rank: int, num_ranks: int) -> None:
    """Prepared shapes are captured without a call before, and give what eager calls give."""
    device = torch.device("cuda", rank)
    weight = torch.randn(4096, 1024, device=device).bfloat16()
    rows = (1, 16, 128, 512, 2048)
    contexts.of(None, device).prepare([weight], rows)
    for num_rows in rows:
        x, residual = (torch.randn(num_rows, width, device=device).bfloat16() for width in (1024, 4096))
        dist.broadcast(residual, 0)
        norm_weight, outputs = torch.ones(4096, device=device).bfloat16(), []

        def run(x=x, residual=residual, norm_weight=norm_weight, outputs=outputs) -> None:
            outputs[:] = linear_all_reduce(x, weight), *linear_all_reduce_norm(x, weight, residual, norm_weight)

        graph, why = timing.capture(run, 1)
        assert not timing.first_error(why, dist.group.WORLD), (num_rows, why)
        for output in outputs:
            output.zero_()
        graph.replay()
        torch.cuda.synchronize()
        replayed = [output.double() for output in outputs]
        run()
        assert not any(off(one, other.double()) for one, other in zip(replayed, outputs, strict=True)), num_rows
        graph.reset()


@pytest.mark.gpu(num_gpus=2)
@pytest.mark.parametrize("program", [nested, from_two_streams], ids=lambda program: program.__name__)
def test_collectives_of_several_streams_are_right(program):
    run_ranks(program, backend="nccl", timeout_s=120)


@pytest.mark.gpu(num_gpus=2)
def test_prepared_shapes_are_captured_at_once(cache):
    run_ranks(captured_at_once, backend="nccl", timeout_s=240)


ABSENT = """
import os, sys, time, torch, torch.distributed as dist
rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
from maco_lib.overlap import LinearPlan, linear_all_reduce, linear_all_reduce_norm
x, w = (torch.ones(m, 1024, device=f"cuda:{rank}").bfloat16() for m in (16, 2048))
old, scale = torch.ones(16, 2048, device=x.device).bfloat16(), torch.ones(2048, device=x.device).bfloat16()
technique, backend = sys.argv[1:]
plan = None if technique == "fused" else LinearPlan(technique, backend)
call = lambda: linear_all_reduce(x, w, plan=plan) if plan else linear_all_reduce_norm(x, w, old, scale, plan="fused")
call()
torch.cuda.synchronize()
dist.barrier()
if rank == 0:
    call()
    try:
        torch.cuda.synchronize()
        print("nothing at the synchronisation")
    except RuntimeError as error:
        print("synchronisation:", str(error).splitlines()[0])
    try:
        call()
    except RuntimeError as error:
        print("call:", error)
else:
    time.sleep(6)
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.gpu(num_gpus=2)
@pytest.mark.parametrize(
    ("technique", "backend", "kernel"),
    [
        ("sequential", "maco_pull_8", "sum_shares"),
        ("sequential", "maco_staged_8", "add_share"),
        ("sequential", "maco_push_64", "push_two_shot"),
        ("sequential", "maco_ll", "one_shot"),
        ("sequential", "maco_ll128", "ll128"),
        ("decode", "", "take_sum"),
        ("persistent", "", "persistent"),
        ("fused", "", "take_norm"),
    ],
)
def test_no_kernel_waits_for_ever(technique, backend, kernel):
    """Rank 1 makes one call less: rank 0 is told at its next synchronisation, and by name at its next call."""
    environment = {**os.environ, "MACO_WAIT_S": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    begin = time.perf_counter()
    found = subprocess.run(
        [*command, sys.executable, "-c", ABSENT, technique, backend],
        capture_output=True, text=True, timeout=90, env=environment,
    )  # fmt: skip
    output = found.stdout + found.stderr
    assert "synchronisation: CUDA error" in output, output
    assert f"call: rank 1 of group '0' did not come, or waits for one that did not: the kernel '{kernel}'" in output
    assert time.perf_counter() - begin < 60
