"""`plan="auto"` of `linear_all_reduce`: measured and looked up, on every rank the same, never a gamble."""

import math
import types
import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from maco_lib.linear import planner as linear_auto
from maco_lib.linear.lookup import shipped
from maco_lib.linear.plan import candidates
from maco_lib.linear.planner import LinearPlanner, nearby
from maco_lib.linear.techniques import techniques
from maco_lib.linear.techniques.persistent_time import TILINGS
from maco_lib.overlap import LinearPlan, RowParallelLinear, decisions, linear_all_reduce, tune_linear
from maco_lib.overlap.plan import keep

NCCL, PUSH = LinearPlan(backend="nccl"), LinearPlan(backend="maco_push_64")
CHUNKED = LinearPlan("chunked", "maco_push_64", 2)
GLOO, HALVES = LinearPlan(backend="gloo"), LinearPlan("chunked", "gloo", 2)

# -- what is measured --------------------------------------------------------------------------------------------------


def test_every_technique_is_a_candidate_on_gpus_and_fused_ones_nowhere_else():
    assert {plan.technique for plan in candidates("cuda", ["nccl", "maco_push_64"])} == set(techniques())
    assert {plan.technique for plan in candidates("cpu", ["gloo"])} == {"sequential", "chunked"}


def test_tuning_measures_every_plan_for_the_shape_and_keeps_the_fastest(monkeypatch):
    fastest = LinearPlan("persistent", tiling="2x96")

    class Timed:
        def __init__(self, num_rows, weight, group):
            pass

        def fault(self, plan):
            return "wrong" if plan == CHUNKED else ""

        def times_us(self, plans, **options):
            assert CHUNKED not in plans
            return 300.0, {plan: 390.0 if plan == fastest else 450.0 for plan in plans}

    monkeypatch.setattr(linear_auto, "Shape", Timed)
    monkeypatch.setattr(linear_auto, "sums", lambda *arguments: True)
    monkeypatch.setattr(LinearPlanner, "ran", lambda *arguments: None)
    monkeypatch.setattr(LinearPlanner, "group", dist.group)
    monkeypatch.setattr(LinearPlanner, "decide", lambda self, layer, num_rows, how: types.SimpleNamespace())
    decision = gpu_planner().tune(linear_auto.Layer(5120, 6400, torch.bfloat16, even=True), 4096, None, 0.1)
    assert decision.chosen == fastest and decision.measured_us[CHUNKED] == math.inf
    every = {plan for plan in candidates("cuda", gpu_planner().backends) if plan.technique != "decode"}
    assert set(decision.measured_us) == every and len(TILINGS) < len(every)


# -- looking up --------------------------------------------------------------------------------------------------------


def test_rows_between_tuned_ones_take_an_overlapping_plan_only_if_both_sides_do():
    tuned = {64: PUSH, 256: NCCL, 512: CHUNKED, 1024: HALVES}
    wanted = {128: PUSH, 129: NCCL, 200: NCCL, 300: NCCL, 500: NCCL, 600: CHUNKED, 900: HALVES, 2048: HALVES,
              2049: None, 32: PUSH, 31: None}  # fmt: skip
    assert {num_rows: nearby(tuned, num_rows) for num_rows in wanted} == wanted
    assert nearby({}, 7) is None
    # A plan for few rows is none for more of them, however near.
    decode = LinearPlan("decode")
    assert nearby({64: decode}, 40) == decode and nearby({64: decode}, 65) is None
    assert nearby({64: decode, 128: NCCL}, 70) == NCCL and nearby({32: PUSH, 64: decode}, 60) == PUSH


def gpu_planner(machine: str = "h200-x2") -> LinearPlanner:
    planner = object.__new__(LinearPlanner)
    planner.device, planner.default = torch.device("cuda"), NCCL
    planner.state = types.SimpleNamespace(calls={})
    planner.backends = ["nccl", "maco_push_64", "maco_ll"]
    planner.table = shipped(*machine.split("-x")[:1], int(machine[-1]))
    return planner


def looked_up(monkeypatch, planner: LinearPlanner, num_rows: list[int], **layer) -> list[LinearPlan]:
    monkeypatch.setattr(linear_auto, "sums", lambda *arguments: True)
    monkeypatch.setattr(LinearPlanner, "decide", lambda *arguments: types.SimpleNamespace())
    of = linear_auto.Layer(**{"n": 4096, "k": 2048, "dtype": torch.bfloat16, "even": True} | layer)
    return [planner.look_up(of, m) for m in num_rows]


def test_untuned_a_plan_is_looked_up_that_is_for_the_rows_of_the_call(monkeypatch):
    planner = gpu_planner()
    decode, persistent = LinearPlan("decode"), LinearPlan("persistent")
    assert looked_up(monkeypatch, planner, [1, 3, 16, 2048, 5000]) == [decode] * 3 + [persistent] * 2
    assert looked_up(monkeypatch, planner, [65, 100])[0].technique == "sequential"  # too many rows for decode
    assert looked_up(monkeypatch, planner, [16, 2048], even=False) == [NCCL] * 2
    assert looked_up(monkeypatch, planner, [16, 2048], dtype=torch.float32) == [NCCL] * 2
    assert looked_up(monkeypatch, planner, [256, 2048], n=4090) == [PUSH, CHUNKED]  # N for none of our kernels
    planner.backends.remove("maco_ll")  # the GPUs do not reach each other's memory
    assert looked_up(monkeypatch, planner, [16, 4096]) == [NCCL, CHUNKED]
    planner.table = None
    assert looked_up(monkeypatch, planner, [16, 2048]) == [NCCL] * 2


def test_measured_plans_replace_the_simpler_ones_only_when_faster():
    assert keep({NCCL: 100.0, PUSH: 90.0, CHUNKED: 80.0}, NCCL) == CHUNKED
    assert keep({NCCL: 100.0, PUSH: 90.0, CHUNKED: 89.5}, NCCL) == PUSH
    assert keep({NCCL: 100.0, PUSH: 99.5, CHUNKED: math.inf}, NCCL) == NCCL


# -- on ranks ----------------------------------------------------------------------------------------------------------


def watched() -> list[LinearPlan]:
    """The plans that calls follow from now on."""
    from maco_lib.linear import op as linear

    followed: list[LinearPlan] = []
    run = linear.Call.run
    linear.Call.run = lambda call, *operands: (followed.append(call.plan), run(call, *operands))[1]
    return followed


def check(rank: int, num_ranks: int, num_rows: int, n: int, k: int, **options) -> None:
    """One call is right; k: of all ranks."""
    generator = torch.Generator().manual_seed(num_rows)
    x, weight = (torch.randn(rows, k, generator=generator) for rows in (num_rows, n))
    mine = [tensor.tensor_split(num_ranks, dim=1)[rank] for tensor in (x, weight)]
    torch.testing.assert_close(linear_all_reduce(*mine, **options), x @ weight.t(), rtol=1e-3, atol=1e-3)


def told(num_rows: int, how: str):
    return [it for it in decisions() if getattr(it, "num_rows", None) == num_rows and it.how == how]


def tuned_and_looked_up(rank: int, num_ranks: int) -> None:
    from maco_lib.linear.measure import Shape

    followed = watched()
    for num_rows in (300, 290, 7):
        check(rank, num_ranks, num_rows, 96, 64)
    # There is no table of CPUs: the default, told once for the weight's shape.
    (decision,) = told(300, "default")
    assert decision.n == 96 and decision.k == 32 and decision.chosen == GLOO and followed == [GLOO] * 3
    assert math.isnan(decision.gain) and not told(290, "default") and not told(7, "default")

    # What is measured decides; the ranks' own clocks are not asked one by one.
    measured = {GLOO: 100.0, HALVES: 70.0, LinearPlan("chunked", "gloo", 4): 80.0}
    Shape.times_us, really = (
        lambda self, plans, **rest: (30.0, {plan: measured[plan] for plan in plans}),
        Shape.times_us,
    )
    weight = torch.randn(96, 32)
    decided = tune_linear(weight, [512, 256, 512])
    assert list(decided) == [256, 512] and decided[512].measured_us[GLOO] == 100.0 and told(512, "tune")
    for num_rows, found in decided.items():
        assert found.chosen == (HALVES if HALVES in found.measured_us else GLOO), num_rows
    measured[HALVES] = measured[LinearPlan("chunked", "gloo", 4)] = 99.5
    assert tune_linear(weight, [256])[256].chosen == GLOO
    Shape.times_us = really
    followed.clear()
    for num_rows in (512, 256, 300, 700):
        check(rank, num_ranks, num_rows, 96, 64)
    chosen = decided[512].chosen
    assert followed == [chosen, GLOO, GLOO, chosen]

    # For real, and the same on every rank.
    layer = RowParallelLinear(torch.randn(64, 48))
    everyones = [None] * num_ranks
    dist.all_gather_object(everyones, {m: str(found.chosen) for m, found in layer.tune([1, 40, 512]).items()})
    assert everyones[0] == everyones[1] and set(everyones[0]) == {1, 40, 512}
    assert all(told(m, "tune")[-1].measured_us[GLOO] > 0 for m in (1, 40, 512))

    # Calls of changing shapes leave no more behind than there are plans.
    before = len(decisions())
    for num_rows in range(1, 1200, 13):
        linear_all_reduce(torch.randn(num_rows, 48), layer.weight)
    assert len(decisions()) - before <= 1


def uneven_shares_and_compiled(rank: int, num_ranks: int) -> None:
    followed = watched()
    for num_rows in (5, 600):
        check(rank, num_ranks, num_rows, 80, 33)
    assert followed[-2:] == [GLOO, GLOO]
    weight = torch.randn(80, 17 - rank)
    assert tune_linear(weight, [300])[300].chosen in (GLOO, HALVES)
    check(rank, num_ranks, 300, 80, 33)
    check(rank, num_ranks, 0, 80, 64)
    # Another type: the default, until it is tuned.
    half = torch.ones(300, 16, dtype=torch.bfloat16)
    assert (linear_all_reduce(half, half[:72]) == 32).all() and followed[-1] == GLOO
    assert set(tune_linear(half[:72], [300])[300].measured_us) == {GLOO, HALVES}
    # Weights that are not loaded yet: every plan gives zeros, as it should.
    zeros = tune_linear(torch.zeros_like(half[:64]), [300])[300]
    assert math.isfinite(zeros.measured_us[HALVES])

    layer = RowParallelLinear(torch.randn(64, 32))
    block = torch.compile(lambda x: layer(x), fullgraph=True, dynamic=True, backend="aot_eager")
    layer.tune([256])
    followed.clear()
    for num_rows in (256, 9):
        x = torch.randn(num_rows, 32)
        torch.testing.assert_close(block(x), linear_all_reduce(x, layer.weight, plan=None))
    assert followed[0] == told(256, "tune")[-1].chosen

    plain = {"num_rows": [4], "weight": torch.ones(6, 4)}
    for wrong, message in [
        ({"num_rows": []}, r"num_rows = \[\]"),
        ({"num_rows": [4, 0]}, r"num_rows = \[4, 0\]"),
        ({"weight": torch.ones(6)}, r"weight = \(6,\)"),
        ({"weight": torch.ones(6, 4).int()}, "torch.int32 is not a tensor"),
        ({"weight": torch.ones(6, 4, device="meta")}, "weight is on meta"),
        ({"num_rows": [4 + rank]}, "the ranks disagree"),
        ({"num_rows": [0 if rank else 4]}, ("" if rank else "rank 1 refuses .*") + r"num_rows = \[0\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            tune_linear(**plain | wrong)
    groups = [dist.new_group([other]) for other in range(num_ranks)]
    assert tune_linear(weight, [4], groups[rank]) == {}
    with pytest.raises(ValueError, match=f"rank {rank} is not in the group given to tune_linear"):
        tune_linear(weight, [4], groups[1 - rank])


def captured_as_if(rank: int, num_ranks: int) -> None:
    """What a capture may follow, without a GPU: the planner is told that it is on one, and capturing."""
    from maco_lib.linear.measure import Shape
    from maco_lib.linear.planner import planner

    Shape.times_us = lambda self, plans, **rest: (1.0, {plan: 1.0 + (plan != HALVES) for plan in plans})
    tuned, unknown = torch.randn(96, 32), torch.randn(96, 48)
    owner, capturing = planner(dist.group.WORLD, torch.device("cpu")), torch.cuda.is_current_stream_capturing
    tune_linear(tuned, [512, 600])
    linear_all_reduce(torch.randn(400, 32), tuned, torch.ones(96))

    def plan(num_rows: int, weight: torch.Tensor = tuned, bias: bool = False) -> LinearPlan:
        owner.device, torch.cuda.is_current_stream_capturing = torch.device("cuda", 0), lambda: True
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            chosen = owner.plan(num_rows, weight, (bias, False))
        owner.device, torch.cuda.is_current_stream_capturing = torch.device("cpu"), capturing
        assert all("run it once before the capture" in str(warning.message) for warning in caught)
        return ("warned", chosen) if caught else chosen

    assert plan(512) == plan(600) == plan(400, bias=True) == HALVES
    assert plan(400) == plan(513) == plan(512, bias=True) == plan(64, unknown) == ("warned", GLOO)
    assert plan(400) == GLOO and told(400, "captured unprepared")[0].chosen == GLOO  # told once
    linear_all_reduce(torch.randn(400, 32), tuned)
    assert plan(400) == HALVES
    # A workspace that has grown is another one, of which the backends may have to be told.
    owner.workspace = -1
    assert plan(600) == ("warned", GLOO)


def test_auto_follows_what_was_measured_and_the_default_elsewhere():
    run_ranks(tuned_and_looked_up)


def test_auto_with_uneven_shares_other_types_and_compiled():
    run_ranks(uneven_shares_and_compiled)


def test_a_capture_follows_only_what_has_run():
    run_ranks(captured_as_if)


def test_a_group_of_one_has_nothing_to_tune():
    assert tune_linear(torch.ones(3, 4), [5]) == {}
    assert torch.equal(linear_all_reduce(torch.ones(2, 4), torch.ones(3, 4)), torch.full((2, 3), 4.0))


# -- on GPUs -----------------------------------------------------------------------------------------------------------


def captured(rank: int, num_ranks: int) -> None:
    """What was tuned or has run is captured with its plan; what was not, with the default and a warning."""
    from maco_lib.linear.measure import Shape

    device = torch.device("cuda", rank)
    weight, other = (torch.randn(1024, k, device=device, dtype=torch.bfloat16) for k in (512, 256))
    # Plans that are not the default's, whatever is the fastest here.
    times_us, look_up = Shape.times_us, LinearPlanner.look_up
    Shape.times_us = lambda self, plans, **rest: (1.0, {plan: 1.0 + (plan != plans[-1]) for plan in plans})
    LinearPlanner.look_up = lambda self, layer, num_rows: PUSH
    tuned = {num_rows: decision.chosen for num_rows, decision in tune_linear(weight, [8, 2048]).items()}
    assert NCCL not in tuned.values()
    followed = watched()
    for weight_here, num_rows, wanted in [(weight, 2048, tuned[2048]), (weight, 8, tuned[8]), (weight, 64, PUSH),
                                          (other, 8, PUSH)]:  # fmt: skip
        x = torch.randn(num_rows, weight_here.shape[1], device=device, dtype=torch.bfloat16)
        expected = linear_all_reduce(x, weight_here, plan=None).float()
        for has_run in (False, True):
            graph = torch.cuda.CUDAGraph()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    result = linear_all_reduce(x, weight_here)
            prepared = has_run or weight_here is weight and num_rows in tuned
            assert followed[-1] == (wanted if prepared else NCCL), (num_rows, has_run)
            assert prepared != any("run it once before the capture" in str(warning.message) for warning in caught)
            result.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert float((result.float() - expected).norm() / expected.norm()) < 0.02
            graph.reset()
            eager = linear_all_reduce(x, weight_here)
            assert followed[-1] == wanted, num_rows
            assert float((eager.float() - expected).norm() / expected.norm()) < 0.02
    Shape.times_us, LinearPlanner.look_up = times_us, look_up
    for dtype in (torch.float16, torch.float32):
        x, weight = torch.ones(300, 64, device=device, dtype=dtype), torch.ones(128, 64, device=device, dtype=dtype)
        assert (linear_all_reduce(x, weight) == 64 * num_ranks).all()
        found = tune_linear(weight, [300])[300]
        assert math.isfinite(found.measured_us[found.chosen])
        assert (linear_all_reduce(x, weight) == 64 * num_ranks).all()


@pytest.mark.gpu(num_gpus=2)
def test_auto_on_two_gpus():
    run_ranks(captured, backend="nccl", timeout_s=240)
