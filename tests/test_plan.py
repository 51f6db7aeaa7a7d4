"""Plans: all give the right result, "auto" settles on the faster one, on every rank the same, and errors are clear."""

import dataclasses
import functools
import itertools
import json
import pathlib
import time
import types

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from maco_lib import comm
from maco_lib import state as states
from maco_lib.overlap import LinearPlan, Plan, calibrate, decisions, execute, overlap, start, tune
from maco_lib.overlap.model import Stretch
from maco_lib.overlap.plan import LEFT_TO, MAX_CANDIDATES, captured, choose, overlapping, sequential, shortlist
from maco_lib.overlap.planner import FIRST_CALLS, ROUNDS

CPU = torch.device("cpu")
SEQUENTIAL, OVERLAPPED = sequential("cpu"), Plan("gloo", urgent=False)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("MACO_CACHE", str(tmp_path))
    return tmp_path


def small_grid() -> None:
    from maco_lib.overlap import calibration

    beside = ((2**16, 64), (2**16, 128), (2**18, 64))
    calibration.GRIDS["cpu"] = calibration.Grid((2**16, 2**18), beside, budget_s=0.02)


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


def test_sms_are_left_to_a_backend_that_holds_many_to_the_end():
    assert {plan.backend: plan.leaves for plan in overlapping("cuda", comm.BACKENDS) if plan.leaves} == LEFT_TO
    assert not any(plan.leaves for plan in overlapping("cpu", ["gloo", *LEFT_TO]))
    assert {name: comm.backend(name).num_ctas for name in LEFT_TO} == LEFT_TO


def test_the_shortlist_is_short_and_has_what_it_is_judged_against():
    plans = overlapping("cuda", list(comm.BACKENDS))
    predicted = {plan: 100.0 + index for index, plan in enumerate(plans)}
    predicted |= {Plan(name, overlapped=False).on("cuda"): 200.0 for name in comm.BACKENDS}
    faster = Plan("symm_mem_two_shot", overlapped=False)
    predicted[faster] = 150.0
    chosen = shortlist(predicted, "cuda")
    assert len(chosen) == MAX_CANDIDATES and chosen[:2] == [sequential("cuda"), faster]
    assert chosen[2:] == plans[: MAX_CANDIDATES - 2]  # the best of each backend, best first
    assert shortlist({sequential("cuda"): 1.0}, "cuda") == [sequential("cuda")]


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
    for times, kept in {(90.0, 85.0): aside, (90.0, 89.5): lead, (90.0, 95.0): lead, (99.5, 98.0): aside}.items():
        assert choose({sequential("cuda"): 100.0, lead: times[0], aside: times[1]}, "cuda") == kept


def test_for_a_graph_every_leading_plan_is_also_tried_with_the_roles_exchanged():
    plans = overlapping("cuda", list(comm.BACKENDS))
    leading = [plan for plan in plans if plan.leads]
    others = captured([sequential("cuda"), *plans])
    assert [(plan.backend, plan.leaves) for plan in others] == [(plan.backend, plan.leaves) for plan in leading]
    assert leading and all(plan.overlapped and plan.urgent and not plan.leads for plan in others)
    assert captured([sequential("cpu"), *overlapping("cpu", ["gloo"])]) == []


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


def timed(tensor_us: float, plans: dict[Plan, float]):
    """Let the trials see these times instead of what the clock says: of the computation, and of each plan."""
    from maco_lib.overlap import planner as auto

    def collect(self) -> None:
        if self.running is not None:
            plan, _ = self.running
            self.running = None
            if self.candidates:
                self.times_us[plan].append(plans[plan])
            else:
                self.t_comp_us.append(tensor_us)

    auto.Trial.collect = collect


def until_settled(rank: int, num_ranks: int, key: str) -> tuple[Plan, list[Plan], int]:
    """(chosen, plan of each call, number of calls) of `auto` on a small tensor; every call is checked."""
    from maco_lib.overlap import execute
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
    small_grid()
    calibrate(CPU)
    # Each rank alone would choose another plan: the slowest rank counts.
    timed(50.0, {SEQUENTIAL: 100.0, OVERLAPPED: 120.0 if rank else 60.0})
    chosen, ran, number = until_settled(rank, num_ranks, "hurts")
    assert chosen == SEQUENTIAL == ran[-1] and ran[:3] == [SEQUENTIAL] * 3 and OVERLAPPED in ran
    decision = decisions()[-1]
    assert decision.key == "hurts" and decision.how == "calls" and decision.t_comp_us == 50.0
    assert decision.measured_us == {SEQUENTIAL: 100.0, OVERLAPPED: 120.0} and set(decision.predicted_us) >= {SEQUENTIAL}
    timed(50.0, {SEQUENTIAL: 100.0, OVERLAPPED: 70.0 + 10 * rank})
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
    until_settled(rank, num_ranks, "helps, but fails")
    assert decisions()[-1].t_comp_us == 50.0


def tuning_knows_graphs_from_eager_code(rank: int, num_ranks: int) -> None:
    """A plan that is tried for graphs only is followed there only, however fast its replays are."""
    from maco_lib.overlap import execute
    from maco_lib.overlap import planner as auto

    small_grid()
    for_graphs, followed, run_plan = Plan("gloo", urgent=False, compute_first=True), [], execute.run_plan
    times = {"compute": 50.0, str(SEQUENTIAL): 100.0, str(OVERLAPPED): 80.0, str(for_graphs): 60.0}
    auto.captured = lambda plans: [for_graphs]
    auto.interleave = lambda arms, **request: {arm.name: arm.name for arm in arms}
    auto.median_us = times.get
    execute.run_plan = lambda plan, *rest: (followed.append(plan), run_plan(plan, *rest))[1]
    tensor = torch.ones(1000)

    def follow() -> Plan:
        overlap(lambda: None, tensor, plan="auto", key="both")
        return followed[-1]

    assert tune(lambda: None, tensor, key="both") == for_graphs
    decision = decisions()[-1]
    assert (decision.captured, decision.chosen) == (for_graphs, OVERLAPPED) and len(decision.measured_us) == 3
    assert follow() == OVERLAPPED
    auto.capturing = lambda device: True
    assert follow() == for_graphs
    del times[str(for_graphs)]
    auto.captured = lambda plans: []
    assert tune(lambda: None, tensor, key="both") == OVERLAPPED == follow()


def tuning_finds_out(rank: int, num_ranks: int) -> None:
    """Computations that one of the plans harms: slow while the all-reduce is under way, and slow while it is not."""
    from maco_lib.overlap import execute
    from maco_lib.overlap import planner as auto

    small_grid()
    planner, unknown = auto.planner(None, CPU), ("named", 3000, "torch.float32", False)
    assert planner.foretell(unknown) == SEQUENTIAL and not decisions()[-1].predicted_us
    tensor, under_way, launch = torch.empty(1000), [], execute.launch
    beside: list[bool] = []  # of each computation, whether the all-reduce was under way

    def watched(run, *rest, **named):
        under_way.append(1)
        return launch(run, *rest, **named)

    execute.launch = watched
    for key, slow_beside, wanted in ((None, True, SEQUENTIAL), ("named", False, OVERLAPPED)):

        def compute() -> None:
            beside.append(bool(under_way))
            time.sleep(0.03 if beside[-1] == slow_beside else 0.002)  # noqa: B023
            under_way.clear()

        tensor.fill_(7.0)
        assert tune(compute, tensor, key=key, budget_s=0.1) == wanted
        assert (tensor == 7.0).all()
        decision = decisions()[-1]
        assert decision.how == "tune" and (decision.key == "named" or ".compute:" in decision.key)
        (other,) = decision.measured_us.keys() - {wanted}
        assert decision.measured_us[other] > 2 * decision.measured_us[wanted] > 2000
        # What was tuned is followed at once, and the computation run once.
        tensor.fill_(rank + 1.0)
        beside.clear()
        overlap(compute, tensor, plan="auto", key=key)
        assert beside == [wanted == OVERLAPPED] and (tensor == 3.0).all()
    execute.launch = launch
    assert len(decisions()) == 3
    # Nothing to sum: nothing to choose.
    empty = torch.empty(0)
    for _ in range(5):
        assert overlap(lambda: 42, empty, plan="auto", key="empty") == (42, empty)
    assert tune(int, empty) == SEQUENTIAL and len(decisions()) == 3
    # The default must work: without it there is nothing to judge a plan against.
    refusal, auto.refusal = auto.refusal, lambda plan, scratch, group: "out of memory"
    with pytest.raises(RuntimeError, match="gloo, the default all-reduce, fails: rank 0: out of memory"):
        tune(int, tensor, key="fails")
    auto.refusal = refusal
    # Where nothing can be measured: by the model for a known key, else sequential.
    assert planner.foretell(("never seen", 4000, "torch.float32", False)) == SEQUENTIAL
    planner.foretell(unknown)
    assert set(decisions()[-1].predicted_us) == {SEQUENTIAL, OVERLAPPED}  # which it is not any more
    known = decisions()[1]
    for num_bytes, stretch, wanted in (
        (2000, Stretch(1.0, 1.0, 0.0), OVERLAPPED), (1000, Stretch(1.0, 1.0, 1e4), SEQUENTIAL),
    ):  # fmt: skip
        planner.calibration = dataclasses.replace(planner.calibration, stretches={OVERLAPPED: stretch})
        for _ in range(2):  # decided once
            assert planner.foretell((known.key, num_bytes, "torch.float32", False)) == wanted
        foretold = decisions()[-1]
        assert foretold.how == "predicted" and set(foretold.predicted_us) == {SEQUENTIAL, OVERLAPPED}
        assert foretold.t_comp_us == pytest.approx(known.t_comp_us * num_bytes / 4000)
    assert len(decisions()) == 8  # with that which failed, of an unknown key, and of the one that became known


def test_auto_settles_on_the_faster_plan_and_on_every_rank_the_same(cache):
    run_ranks(auto_settles)


def test_tuning_measures_at_once(cache):
    run_ranks(tuning_finds_out)


def test_what_is_tried_for_graphs_is_followed_in_graphs_only(cache):
    run_ranks(tuning_knows_graphs_from_eager_code)


# -- calibration -------------------------------------------------------------------------------------------------------


def calibrations(rank: int, num_ranks: int) -> None:
    from maco_lib.overlap import calibration

    small_grid()
    measured, measure = [], calibration.measure
    calibration.measure = lambda *rest: (measured.append(1), measure(*rest))[1]

    def again(force: bool = False) -> calibration.Calibration:
        states.of(None, CPU).forget(calibration.stored_or_measured)  # as in a new process
        return calibration.calibrate(CPU, force=force)

    # A fault of the rank that reads and writes the file: all are told, none waits for it.
    def homeless():
        raise RuntimeError("no home")

    known, calibration.this_machine = calibration.this_machine, homeless
    with pytest.raises(RuntimeError, match="failed on rank 0: RuntimeError: no home"):
        again()
    calibration.this_machine = known

    first = again()
    assert measured == [1] and set(first.stretches) == {OVERLAPPED} and first.unusable == {}
    predicted = first.predictions(2**17, 1000.0, False)
    assert set(predicted) == {SEQUENTIAL, OVERLAPPED}
    assert predicted[SEQUENTIAL] == pytest.approx(1000.0 + first.all_reduce["staged"]["gloo"](2**17))
    assert again().to_json() == first.to_json() and measured == [1]
    assert calibration.calibrate(CPU) is calibration.calibrate(CPU)

    (path,) = pathlib.Path(calibration.default_cache(), "calibration").iterdir()
    assert path.name.endswith("-cpu-2-ranks.json")
    content = json.loads(path.read_text())
    assert content["provenance"]["time"] and content["provenance"]["made_for"]["all_reduces_sha256"]
    for damage in ('{"kind": "cpu"', json.dumps({**content, "plans": None})):
        dist.barrier()
        path.write_text(damage)
        dist.barrier()
        again()
    assert len(measured) == 3
    versions = calibration.LIBRARIES
    calibration.LIBRARIES = ("numpy",)  # as if a version had changed
    again()
    again()
    assert len(measured) == 4
    calibration.LIBRARIES = versions
    again(force=True)
    assert len(measured) == 5
    dist.barrier()


def backends_that_break(rank: int, num_ranks: int) -> None:
    """Whatever a backend stumbles over, it is left out: an error of the host's compiler is no RuntimeError."""
    from maco_lib.linear import measure as linear_measure
    from maco_lib.linear.techniques import techniques
    from maco_lib.overlap import measure
    from maco_lib.overlap import planner as auto

    def broken(*args, **options):
        raise FileNotFoundError("no C compiler")

    group, told = dist.group.WORLD, "FileNotFoundError: no C compiler"
    sums, comm.all_reduce = comm.all_reduce, broken
    assert measure.fault("gloo", 64, CPU, group) == f"rank 0: gloo: {told}"
    assert auto.refusal(SEQUENTIAL, torch.ones(4), group) == told
    comm.all_reduce = sums
    techniques()["chunked"] = dataclasses.replace(techniques()["chunked"], run=broken)
    plan = LinearPlan("chunked", num_chunks=2)
    fault = linear_measure.Shape(300, torch.ones(8, 4), group).fault(plan)
    assert fault == f"rank 0: {plan}: {told}"


def test_a_backend_that_breaks_in_any_way_is_left_out():
    run_ranks(backends_that_break)


def test_calibration_is_kept_and_refreshed(cache):
    run_ranks(calibrations)


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

    for plan in [*overlapping("cuda", names), *(Plan(name, overlapped=False) for name in names)]:
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
    for call in range(FIRST_CALLS + ROUNDS * MAX_CANDIDATES + 1):
        plain.fill_(rank + 1.0)
        product, _ = overlap(lambda: a @ a, plain, plan="auto", key="calls")
        assert (plain == total).all() and right(product), f"call {call}"
    assert decisions()[-1].how == "calls" and decisions()[-1].chosen
