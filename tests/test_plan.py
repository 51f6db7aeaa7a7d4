"""Plans: all give the right result, "auto" settles on the faster one, on every rank the same, and errors are clear."""

import dataclasses
import functools
import itertools
import pathlib
import time
import types

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from maco_lib import comm
from maco_lib.overlap import LinearPlan, Plan, decisions, execute, overlap, search, start, tune
from maco_lib.overlap.plan import captured, choose, sequential
from study.sections.overlap.methods import LEFT_TO

CPU = torch.device("cpu")
SEQUENTIAL, OVERLAPPED = sequential("cpu"), Plan("gloo", urgent=False)
COMPUTE_FIRST = Plan("gloo", urgent=False, compute_first=True)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("MACO_CACHE", str(tmp_path))
    return tmp_path


# -- which plans to try and to keep ------------------------------------------------------------------------------------


def test_a_plan_says_what_it_does():
    assert str(Plan("maco_push_64")) == "maco_push_64, overlapped, urgent"
    assert str(Plan(overlapped=False).on("cuda")) == "nccl, sequential"
    assert str(Plan(urgent=False, compute_first=True).on("cuda")) == "nccl, overlapped, computation first"
    assert str(Plan(urgent=False, leads=True).on("cuda")) == "nccl, overlapped, leading"
    assert not Plan(leads=True).on("cpu").leads
    for other in ({"compute_first": True}, {"overlapped": False}):
        with pytest.raises(ValueError, match="leads = True"):
            Plan(leads=True, **other)
    assert str(Plan("maco_staged_12", urgent=False, leaves=12)) == "maco_staged_12, overlapped, leaving 12 SMs"
    assert not Plan(leaves=12).on("cpu").leaves
    for wrong in ({"leaves": -1}, {"leaves": 4, "overlapped": False}):
        with pytest.raises(ValueError, match=f"leaves = {wrong['leaves']}"):
            Plan(**wrong)
    assert Plan().on("cpu") == OVERLAPPED


def test_as_many_sms_are_reserved_as_the_backend_holds():
    assert {name: comm.backend(name).num_ctas for name in LEFT_TO} == LEFT_TO


def test_each_stage_follows_from_the_times_before():
    """Times by backend alone: the two fastest come through, whatever the order of issue."""
    backends = list(comm.BACKENDS)
    fast = backends[-2:]

    def times(stage: search.Stage) -> dict[Plan, float]:
        return {
            plan: 100.0 + 10 * (plan.backend not in fast) - 5 * plan.compute_first - plan.leaves / 10
            for plan in stage.plans
        }

    first = search.first_look("cuda", backends, True)
    assert first.plans[0] == sequential("cuda") and {plan.backend for plan in first.plans} == {*backends, "nccl"}
    known = times(first)
    closer = search.closer_look("cuda", known, True)
    assert {plan.backend for plan in closer.plans} == set(fast) and not set(closer.plans) & set(first.plans)
    assert {plan.leaves for plan in closer.plans} == set(search.RESERVED)
    known |= times(closer)
    final = search.final("cuda", known)
    assert final.plans[0] == sequential("cuda") and not final.plans[1].overlapped
    best = min(known, key=known.get)
    assert best in final.plans and best.compute_first and best.leaves == max(search.RESERVED)
    calls = sum(len(stage.plans) * stage.num_rounds for stage in (first, closer, final))
    assert calls <= search.most_calls(len(backends), True) <= 250
    slow = {plan: us * 1e4 for plan, us in known.items()}
    assert search.final("cuda", slow, budget_s=0.1).num_rounds == 3 < search.final("cuda", slow).num_rounds


def test_on_a_cpu_there_is_little_to_look_at():
    assert search.first_look("cpu", ["gloo"], False).plans == (SEQUENTIAL, OVERLAPPED)
    assert search.closer_look("cpu", {SEQUENTIAL: 1.0, OVERLAPPED: 2.0}, False).plans == (COMPUTE_FIRST,)
    times = {SEQUENTIAL: 1.0, OVERLAPPED: 2.0, COMPUTE_FIRST: 3.0}
    assert set(search.final("cpu", times).plans) == set(times)


def test_overlap_is_kept_only_where_it_beats_the_best_sequential_plan():
    default, overlapped = sequential("cuda"), Plan("symm_mem_two_shot")
    other = Plan("symm_mem_two_shot", overlapped=False)
    inf = float("inf")
    for times, kept in {
        (100.0, 80.0, 70.0): overlapped,
        (100.0, 80.0, 79.5): other,
        (100.0, 80.0, 90.0): other,
        (100.0, 99.5, 99.2): default,  # within noise nothing replaces what is simpler
        (100.0, inf, inf): default,
        (inf, inf, 90.0): overlapped,
    }.items():
        assert choose(dict(zip((default, other, overlapped), times, strict=True)), "cuda") == kept


def test_without_the_lead_only_where_that_is_faster_beyond_noise():
    lead, aside = Plan("maco_push_64", leads=True, urgent=False), Plan("maco_push_64")
    for times, kept in {(90.0, 85.0): aside, (90.0, 88.5): lead, (90.0, 95.0): lead, (99.5, 96.0): aside}.items():
        assert choose({sequential("cuda"): 100.0, lead: times[0], aside: times[1]}, "cuda") == kept


def test_in_a_graph_what_does_not_lead_is_kept_as_soon_as_it_is_faster_beyond_noise():
    lead, aside = Plan("maco_push_64", leads=True, urgent=False), Plan("maco_push_64")
    for aside_us, kept in ((88.5, aside), (89.5, lead)):
        times = {sequential("cuda"): 100.0, lead: 90.0, aside: aside_us}
        assert choose(times, "cuda", aside_margin=0.01) == kept and choose(times, "cuda") == lead


def test_sms_are_reserved_only_where_that_is_faster_beyond_noise():
    lead = Plan("nccl", urgent=False, leads=True)
    reserved = dataclasses.replace(lead, leaves=12)
    for times, kept in {(90.0, 89.5): lead, (90.0, 88.0): reserved}.items():
        assert choose({sequential("cuda"): 100.0, lead: times[0], reserved: times[1]}, "cuda") == kept


def test_for_a_graph_every_leading_plan_is_also_tried_with_the_roles_exchanged():
    plans = search.first_look("cuda", list(comm.BACKENDS), True).plans
    leading = [plan for plan in plans if plan.leads]
    others = captured(plans)
    assert [(plan.backend, plan.leaves) for plan in others] == [(plan.backend, plan.leaves) for plan in leading]
    assert leading and all(plan.overlapped and plan.urgent and not plan.leads for plan in others)
    assert captured(search.first_look("cpu", ["gloo"], False).plans) == []


# -- running them ------------------------------------------------------------------------------------------------------


def test_a_computation_is_held_back_in_and_outside_inference_mode():
    with torch.inference_mode():
        assert execute.run_held_back(lambda: 7, CPU) == 7
    assert execute.run_held_back(lambda: 7, CPU) == 7


def test_only_eager_code_whose_matmul_would_take_every_sm_is_held_back(monkeypatch):
    result, captures, ran = types.SimpleNamespace(device=torch.device("cuda", 0)), [False], []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures[0])
    monkeypatch.setattr(execute, "run_leading", lambda compute, run, device: compute())
    monkeypatch.setattr(execute, "run_leaving", lambda compute, num_sms, device: (ran.append(num_sms), compute())[1])
    monkeypatch.setattr(execute, "run_held_back", lambda compute, device: (ran.append("held"), compute())[1])

    def runs(plan: Plan) -> list:
        ran.clear()
        assert execute.run_plan(plan, lambda: 5, lambda async_op: None, result) == 5
        return list(ran)

    leading, left = Plan("nccl", leads=True), Plan("maco_staged_12", leads=True, leaves=12)
    assert runs(leading) == ["held"] and runs(left) == [12]
    captures[0] = True
    assert runs(leading) == [] and runs(left) == [12]


def every_plan_gives_the_same(rank: int, num_ranks: int) -> None:
    total, a = sum(range(1, num_ranks + 1)), torch.randn(32, 32)
    for dtype, overlapped, urgent, compute_first in itertools.product(
        (torch.float32, torch.bfloat16), *[(True, False)] * 3
    ):
        calls = []
        plan = Plan(overlapped=overlapped, urgent=urgent, compute_first=compute_first)
        tensor = torch.full((100, 3), rank + 1.0, dtype=dtype)
        product, summed = overlap(lambda: (calls.append(1), a @ a)[1], tensor, plan=plan)  # noqa: B023
        assert torch.equal(product, a @ a) and summed is tensor and (tensor == total).all() and calls == [1]
    handles = [start(torch.full((9,), rank + 1.0), plan=Plan(overlapped=flag), check=True) for flag in (True, False)]
    assert all((handle.wait() == total).all() for handle in handles)

    tensor = torch.full((4,), rank + 1.0)
    for plan in (Plan(), Plan(compute_first=True), Plan(overlapped=False)):
        tensor.fill_(rank + 1.0)
        with pytest.raises(KeyError):
            overlap(lambda: {}["nothing"], tensor, plan=plan)
        assert (tensor == total).all()  # the other ranks are not left waiting


def wrong_use_is_refused(rank: int, num_ranks: int) -> None:
    def message(call) -> str:
        with pytest.raises(ValueError) as caught:
            call()
        return str(caught.value)

    x = torch.full((8,), rank + 1.0)
    unknown = message(lambda: overlap(int, x, plan=Plan("telepathy")))
    assert "'telepathy'" in unknown and "symm_mem_two_shot" in unknown
    assert "GPU" in message(lambda: overlap(int, x, plan=Plan("nccl")))
    assert "GPU" in message(lambda: start(x, plan=Plan("symm_mem_two_shot")))
    assert "plan = 'fastest'" in message(lambda: overlap(int, x, plan="fastest"))
    assert "use overlap" in message(lambda: start(x, plan="auto"))
    assert "use overlap" in message(lambda: start(x, plan=Plan(compute_first=True)))
    assert "use overlap" in message(lambda: start(x, plan=Plan(leaves=4)))
    for plan in (Plan(), "auto"):
        assert "reduce_scatter has no plans" in message(lambda: overlap(int, x, "reduce_scatter", plan=plan))  # noqa: B023
        assert "priority = -1" in message(lambda: overlap(int, x, plan=plan, priority=-1))  # noqa: B023
        assert "contiguous" in message(lambda: overlap(int, torch.ones(4, 4).t(), plan=plan))  # noqa: B023
        assert "on meta" in message(lambda: overlap(int, torch.ones(4, device="meta"), plan=plan))  # noqa: B023
        differs = message(lambda: overlap(int, torch.ones(8 + rank), plan=plan, check=True))  # noqa: B023
        assert "rank 0 calls all_reduce of (8,)" in differs and "rank 1 calls all_reduce of (9,)" in differs
        alone = message(lambda: overlap(int, x, plan=Plan("telepathy") if rank else plan, check=True))  # noqa: B023
        assert "'telepathy'" in alone and ("rank 1 refuses" in alone) == (rank == 0)
    for call in (start, functools.partial(overlap, int)):
        differs = message(lambda: call(x, plan=Plan(overlapped=rank == 0), check=True))  # noqa: B023
        assert "by gloo, overlapped, rank 1 calls" in differs and differs.endswith("by gloo, sequential")
    keys = message(lambda: overlap(int, x, plan="auto", key=f"layer {rank}", check=True))
    assert "for 'layer 0'" in keys and "for 'layer 1'" in keys
    key = message(lambda: overlap(int, x, key="layer" if rank else None, check=True))
    assert "key = 'layer' is for plan='auto'" in key
    for plan in (Plan(), None):
        assert "key = 'layer'" in message(lambda: overlap(int, x, plan=plan, key="layer"))  # noqa: B023
    assert "strides (2,)" in message(lambda: comm.all_reduce(torch.ones(8)[::2], "gloo"))
    assert "torch.int64" in message(lambda: tune(int, torch.zeros(3, dtype=torch.long)))
    assert "torch.int64" in message(lambda: tune(int, torch.zeros(3, dtype=torch.long) if rank else x))
    assert "the ranks disagree" in message(lambda: tune(int, torch.ones(3 + rank)))
    assert (x == rank + 1.0).all()

    alone = [dist.new_group([other]) for other in range(num_ranks)][rank]
    assert overlap(lambda: 42, x, group=alone, plan="auto")[0] == 42 and (x == rank + 1.0).all()
    assert tune(int, x, alone) == SEQUENTIAL


def a_group_made_without_a_backends_name(rank: int, num_ranks: int) -> None:
    assert dist.get_backend() == "undefined"
    assert comm.available("all_reduce", CPU, dist.group.WORLD) == ["gloo"]
    tensor = torch.full((8,), rank + 1.0)
    assert overlap(lambda: 42, tensor, plan=Plan())[0] == 42 and (tensor == 3.0).all()


def running_plans(rank: int, num_ranks: int) -> None:
    every_plan_gives_the_same(rank, num_ranks)
    wrong_use_is_refused(rank, num_ranks)


def test_plans_on_two_ranks():
    run_ranks(running_plans)


def test_plans_where_the_group_has_a_backend_for_each_kind_of_device():
    run_ranks(a_group_made_without_a_backends_name, backend="")


# -- auto --------------------------------------------------------------------------------------------------------------


def timed(times_us: dict[Plan, float]) -> None:
    """Let the trials see these times instead of what the clock says."""
    from maco_lib.overlap import planner as auto

    def collect(self) -> None:
        if self.running is not None:
            (plan, _, _), self.running = self.running, None
            self.times_us[plan].append(times_us[plan])

    auto.Trial.collect = collect


def until_settled(rank: int, num_ranks: int, key: str) -> tuple[Plan, list[Plan], int]:
    """(chosen, plan of each call, number of calls) of `auto` on a small tensor; every call is checked."""
    from maco_lib.overlap import planner as auto

    ran, run_plan = [], execute.run_plan
    execute.run_plan = lambda plan, *rest: (ran.append(plan), run_plan(plan, *rest))[1]
    tensor, calls = torch.empty(1000), []
    planner = auto.planner(None, CPU)
    for number in range(1, 100):
        tensor.fill_(rank + 1.0)
        result, summed = overlap(lambda: (calls.append(1), "result")[1], tensor, plan="auto", key=key)
        assert result == "result" and summed is tensor and (tensor == sum(range(1, num_ranks + 1))).all()
        assert len(calls) == number == len(ran)
        if planner.trials[key, 4000, "torch.float32", False].decision.chosen:
            break
    execute.run_plan = run_plan
    return decisions()[-1].chosen, ran, number


def auto_settles(rank: int, num_ranks: int) -> None:
    # Each rank alone would choose another plan: the slowest rank counts.
    timed({SEQUENTIAL: 100.0, OVERLAPPED: 120.0 if rank else 60.0, COMPUTE_FIRST: 130.0})
    chosen, ran, number = until_settled(rank, num_ranks, "hurts")
    assert chosen == SEQUENTIAL == ran[-1] and {OVERLAPPED, COMPUTE_FIRST} < set(ran)
    assert number - 1 <= search.most_calls(1, False) <= 60
    decision = decisions()[-1]
    assert decision.key == "hurts" and decision.how == "calls"
    assert decision.measured_us == {SEQUENTIAL: 100.0, OVERLAPPED: 120.0, COMPUTE_FIRST: 130.0}
    timed({SEQUENTIAL: 100.0, OVERLAPPED: 70.0 + 10 * rank, COMPUTE_FIRST: 90.0})
    chosen, ran, _ = until_settled(rank, num_ranks, "helps")
    assert chosen == OVERLAPPED == ran[-1]
    x = torch.full((1000,), rank + 1.0)
    count = len(decisions())
    overlap(lambda: None, x, plan="auto", key="hurts")  # known from now on
    assert len(decisions()) == count == 2

    # A computation that fails in the midst is told, and the trial goes on.
    def fail() -> None:
        raise KeyError("compute failed")

    for _ in range(2):
        with pytest.raises(KeyError):
            overlap(fail, x, plan="auto", key="helps, but fails")
    assert until_settled(rank, num_ranks, "helps, but fails")[0] == OVERLAPPED


def graphs_follow_what_is_known(rank: int, num_ranks: int) -> None:
    """In a capture nothing is measured: what was tuned, that of a larger tensor of the key, or sequential."""
    from maco_lib.overlap import planner as auto

    followed, run_plan = [], execute.run_plan
    timed({SEQUENTIAL: 100.0, OVERLAPPED: 80.0, COMPUTE_FIRST: 90.0})
    execute.run_plan = lambda plan, *rest: (followed.append(plan), run_plan(plan, *rest))[1]
    tensor = torch.ones(1000)

    def follow(key: str = "both", tensor: torch.Tensor = tensor) -> Plan:
        overlap(lambda: None, tensor, plan="auto", key=key)
        return followed[-1]

    assert tune(lambda: None, tensor, key="both") == OVERLAPPED == follow()
    decisions()[-1].captured = COMPUTE_FIRST  # as replays may say on a GPU
    assert follow() == OVERLAPPED
    auto.capturing = lambda device: True
    assert follow() == COMPUTE_FIRST == follow(tensor=torch.ones(500))
    assert follow(tensor=torch.ones(2000)) == SEQUENTIAL == follow("never seen")
    told = decisions()
    assert [it.how for it in told] == ["tune", *["captured unmeasured"] * 3]
    assert follow("never seen") == SEQUENTIAL and decisions() == told  # said once


def tuning_finds_out(rank: int, num_ranks: int) -> None:
    """Computations that one of the plans harms: slow while the all-reduce is under way, and slow while it is not."""
    from maco_lib.overlap import planner as auto

    tensor, under_way, launch, run_plan = torch.empty(1000), [], execute.launch, execute.run_plan
    beside: list[bool] = []  # of each computation, whether the all-reduce was under way

    def watched(run, *rest, **named):
        under_way.append(1)
        return launch(run, *rest, **named)

    def afresh(plan, *rest):
        under_way.clear()
        return run_plan(plan, *rest)

    execute.launch, execute.run_plan = watched, afresh
    for key, slow_beside, wanted in ((None, True, {SEQUENTIAL, COMPUTE_FIRST}), ("named", False, {OVERLAPPED})):

        def compute() -> None:
            beside.append(bool(under_way))
            time.sleep(0.03 if beside[-1] == slow_beside else 0.002)  # noqa: B023

        tensor.fill_(7.0)
        chosen = tune(compute, tensor, key=key, budget_s=0.1)
        assert chosen in wanted and (tensor == 7.0).all()
        decision = decisions()[-1]
        assert decision.how == "tune" and (decision.key == "named" or ".compute:" in decision.key)
        (other,) = {SEQUENTIAL, OVERLAPPED} - wanted
        assert decision.measured_us[other] > 2 * decision.measured_us[chosen] > 2000
        # What was tuned is followed at once, and the computation run once.
        tensor.fill_(rank + 1.0)
        beside.clear()
        overlap(compute, tensor, plan="auto", key=key)
        assert beside == [chosen == OVERLAPPED] and (tensor == 3.0).all()
    execute.launch, execute.run_plan = launch, run_plan
    assert len(decisions()) == 2
    # Nothing to sum: nothing to choose.
    empty = torch.empty(0)
    for _ in range(5):
        assert overlap(lambda: 42, empty, plan="auto", key="empty") == (42, empty)
    assert tune(int, empty) == SEQUENTIAL and len(decisions()) == 2
    # The default must work: without it there is nothing to judge a plan against.
    refusal, auto.refusal = auto.refusal, lambda backend, scratch, group: "out of memory"
    with pytest.raises(RuntimeError, match="gloo, the default all-reduce, fails: rank 0: out of memory"):
        tune(int, tensor, key="fails")
    auto.refusal = refusal


def test_auto_settles_on_the_faster_plan_and_on_every_rank_the_same(cache):
    run_ranks(auto_settles)


def test_tuning_measures_at_once(cache):
    run_ranks(tuning_finds_out)


def test_what_is_known_is_followed_in_graphs(cache):
    run_ranks(graphs_follow_what_is_known)


def backends_that_break(rank: int, num_ranks: int) -> None:
    """Whatever a backend stumbles over, it is left out: an error of the host's compiler is no RuntimeError."""
    from maco_lib.linear import measure as linear_measure
    from maco_lib.linear.techniques import techniques
    from maco_lib.overlap import planner as auto
    from maco_lib.overlap import trust

    def broken(*args, **options):
        raise FileNotFoundError("no C compiler")

    group, told = dist.group.WORLD, "FileNotFoundError: no C compiler"
    sums, comm.all_reduce = comm.all_reduce, broken
    assert trust.fault("gloo", CPU, group, 64) == f"rank 0: gloo: {told}"
    assert auto.refusal("gloo", torch.ones(4), group) == told
    comm.all_reduce = sums
    techniques()["chunked"] = dataclasses.replace(techniques()["chunked"], run=broken)
    plan = LinearPlan("chunked", num_chunks=2)
    fault = linear_measure.Shape(300, torch.ones(8, 4), group).fault(plan)
    assert fault == f"rank 0: {plan}: {told}"


def test_a_backend_that_breaks_in_any_way_is_left_out():
    run_ranks(backends_that_break)


@pytest.mark.gpu(num_gpus=2)
def test_plans_on_two_gpus(cache):
    run_ranks(plans_on_gpus, backend="nccl", timeout_s=240)


def plans_on_gpus(rank: int, num_ranks: int) -> None:
    """Every backend's plans on plain and symmetric tensors, several in flight, and captured after `tune`."""
    device, group = torch.device("cuda", rank), dist.group.WORLD
    total, a = sum(range(1, num_ranks + 1)), torch.randn(512, 512, device=device)
    plain = torch.empty(2**18, device=device, dtype=torch.bfloat16)
    tensors = [plain, comm.symmetric_empty((2**18,), torch.bfloat16, device, group)]
    exact, bound = a.double() @ a.double(), (2 + 512**0.5) * torch.finfo(torch.float32).eps
    names = comm.available("all_reduce", device, group)

    def right(product: torch.Tensor) -> bool:
        return float((product.double() - exact).norm() / exact.norm()) <= bound

    every = [*search.first_look("cuda", names, True).plans, *(Plan(name, overlapped=False) for name in names)]
    for plan in every:
        for tensor in tensors:
            tensor.fill_(rank + 1.0)
            product, summed = overlap(lambda: a @ a, tensor, plan=plan)
            assert (summed == total).all() and right(product), f"{plan}"
    flights = [torch.full((2**16,), rank + 1.0, device=device) for _ in range(6)]
    plans = [Plan("symm_mem_two_shot"), Plan("maco_push_64", urgent=False), Plan("maco_staged_8", overlapped=False)]
    handles = [start(tensor, plan=plan) for tensor, plan in zip(flights, plans * 2, strict=True)]
    assert all((handle.wait() == total).all() for handle in reversed(handles))

    for tensor in tensors:
        plan = tune(lambda: a @ a, tensor, key="captured")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            product, _ = overlap(lambda: a @ a, tensor, plan="auto", key="captured")
        for _ in range(3):
            tensor.fill_(rank + 1.0)
            graph.replay()
            torch.cuda.synchronize()
            assert (tensor == total).all() and right(product), f"{plan}"
        graph.reset()
    for call in range(search.most_calls(len(names), True) + 1):
        plain.fill_(rank + 1.0)
        product, _ = overlap(lambda: a @ a, plain, plan="auto", key="calls")
        assert (plain == total).all() and right(product), f"call {call}"
    assert decisions()[-1].how == "calls" and decisions()[-1].chosen
