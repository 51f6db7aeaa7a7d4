"""`plan="auto"` of `linear_all_reduce`: predicted, measured and looked up, on every rank the same, never a gamble."""

import itertools
import json
import math
import random
import types
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from ranks import ROOT, run_ranks

from maco_lib.overlap import LinearPlan, RowParallelLinear, decisions, linear_all_reduce, linear_auto, tune_linear
from maco_lib.overlap.costs import Curve
from maco_lib.overlap.left_out import without
from maco_lib.overlap.linear_auto import LinearPlanner, nearby
from maco_lib.overlap.linear_matmul import LOADED, MatmulTime, in_tiles
from maco_lib.overlap.linear_model import MIN_POINTS, LinearCosts, Overlapped, Sides, shortlist
from maco_lib.overlap.linear_plan import HOPPER, TECHNIQUES, candidates
from maco_lib.overlap.linear_techniques.decode_time import DecodeTime, decode_time
from maco_lib.overlap.linear_techniques.persistent_time import (
    TILINGS,
    Tiling,
    ascii_tiling,
    fastest_tiling,
    parse_tiling,
    persistent_time,
)
from maco_lib.overlap.plan import keep

NCCL, PUSH = LinearPlan(backend="nccl"), LinearPlan(backend="maco_push_64")
CHUNKED = LinearPlan("chunked", "maco_push_64", 2)
GLOO, HALVES = LinearPlan(backend="gloo"), LinearPlan("chunked", "gloo", 2)

# -- the model ---------------------------------------------------------------------------------------------------------


def test_a_matmul_takes_whole_waves_of_tiles():
    def one_wave(rows: int, columns: int) -> int:
        return 132 * 2 * (rows * columns + LOADED * (rows + columns)) * 64

    assert in_tiles(64, 64 * 132, 64, 132) == in_tiles(64, 64, 64, 132) == one_wave(64, 64)
    assert in_tiles(128, 128 * 66, 64, 132) == one_wave(64, 128)
    assert in_tiles(128, 128 * 67, 64, 132) == one_wave(64, 160)  # smaller ones would be two waves
    assert in_tiles(128, 256 * 132 + 1, 64, 132) == 3 * one_wave(128, 96)  # less than two of larger ones
    assert in_tiles(10, 20, 30, 0) == 2 * 10 * 20 * 30  # a CPU has no waves
    true = MatmulTime(3.0, 7e8, 4e6, 132, 2)
    shapes = list(itertools.product((1, 64, 256, 1024, 8192), (4096, 8192), (2048, 8192)))
    fitted = MatmulTime.fit(shapes, [true(*shape) for shape in shapes], 132, 2)
    for shape in [(16, 5120, 12800), (2048, 5120, 12800), (16384, 4096, 4096)]:
        assert fitted(*shape) == pytest.approx(true(*shape), rel=0.01)
    assert fitted.spread < 0.01
    noisy = [true(*shape) * (1.2 if number % 2 else 1.0) for number, shape in enumerate(shapes)]
    assert 0.05 < MatmulTime.fit(shapes, noisy, 132, 2).spread < 0.3


SIDES = [Sides(t_matmul, t_comm) for t_matmul, t_comm in ((50, 90), (100, 90), (300, 30), (900, 100), (900, 900))]
T_MATMUL = [sides.t_matmul for sides in SIDES]


def test_overlapping_costs_are_fitted_and_never_below_the_longer_side():
    true = Overlapped(10.0, 1.05, 0.2)
    fitted = Overlapped.fit(SIDES, list(map(true, SIDES)), T_MATMUL)
    assert fitted(Sides(2000, 400)) == pytest.approx(true(Sides(2000, 400)), rel=1e-3) and fitted.spread < 1e-3
    assert fitted.least_us == 140.0
    lucky = Overlapped.fit(SIDES, [0.8 * max(sides.t_matmul, sides.t_comm) for sides in SIDES], T_MATMUL)
    assert lucky(Sides(1e6, 1.0)) >= 1e6


def test_the_error_of_a_gain_has_those_of_the_plan_and_of_the_matmul():
    true, half = Overlapped(10.0, 1.05, 0.2), [0.5 * us for us in T_MATMUL]
    assert Overlapped.fit(SIDES, list(map(true, SIDES)), half).spread > 0.1
    own = [replace(sides, own=DecodeTime(20.0, sides.t_matmul)) for sides in SIDES]
    times_us = [1.1 * sides.own.scaled_us((1, 1)) for sides in own]
    fitted = Overlapped.fit(own, times_us, T_MATMUL)
    assert fitted.scales == pytest.approx((1.1, 1.1)) and fitted.spread < 1e-9
    assert fitted(Sides(1.0, 2.0, DecodeTime(40.0, 60.0))) == pytest.approx(110.0)
    times_us[2] *= 1.5
    assert 0.2 < Overlapped.tried(Overlapped.of_own, own, times_us, T_MATMUL).spread < 0.6


def test_each_part_of_a_techniques_formula_has_its_own_scale_and_the_form_that_foretells_better_is_taken():
    own = [replace(sides, own=DecodeTime(20.0, sides.t_matmul)) for sides in SIDES]
    slow_memory = Overlapped.fit(own, [20.0 + 1.5 * sides.t_matmul for sides in SIDES], T_MATMUL)
    assert slow_memory.scales == pytest.approx((1.0, 1.5)) and slow_memory.spread < 1e-9
    alike = Overlapped(10.0, 1.05, 0.2)
    fitted = Overlapped.fit(own, list(map(alike, SIDES)), T_MATMUL)
    assert not fitted.scales and fitted(own[0]) == pytest.approx(alike(SIDES[0]), rel=1e-3)


def known_to_fail(machine: str, reason: str):
    """A machine whose table does not keep the bound yet: said here, and told when it does."""
    return pytest.param(machine, marks=pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason))


@pytest.mark.parametrize(
    "machine",
    ["h100-x2", "h100-x4", "h200-x2", known_to_fail("h200-x4", "off by 5 % in the median")],
)  # fmt: skip
def test_decode_is_foretold_on_gpus_whose_memory_differs(machine):
    rows = pd.read_csv(ROOT / "data" / machine / "linear_all_reduce.csv")
    rows = rows[rows["method"].eq("decode") & rows["correct"]].sort_values("time_us")
    problems = [
        Sides(1.0, 1.0, decode_time(row.m, row.n, row.k // row.tp, row.tp)) for row in rows.itertuples()
    ]  # fmt: skip
    known = Overlapped.of_own(problems[::4], rows["time_us"].tolist()[::4])
    errors = [abs(known(problem) / us - 1) for problem, us in zip(problems, rows["time_us"], strict=True)]
    assert len(errors) >= 18 and np.median(errors) < 0.03 and max(errors) < 0.12


@pytest.mark.parametrize("machine", ["h100-x2", "h100-x4", "h200-x2", "h200-x4"])
def test_matmuls_are_foretold_on_gpus_whose_memory_differs(machine):
    rows = pd.read_csv(ROOT / "data" / machine / "linear_all_reduce.csv").drop_duplicates(["layer", "m"])
    shapes, times_us = [(row.m, row.n, row.k // row.tp) for row in rows.itertuples()], rows["t_matmul_us"].tolist()
    known = MatmulTime.fit(shapes[::3], times_us[::3], 132, 2)
    errors = [abs(known(*shape) / us - 1) for shape, us in zip(shapes, times_us, strict=True)]
    assert len(errors) == 60 and np.median(errors) < 0.03 and max(errors) < 0.18


@pytest.mark.parametrize(
    ("machine", "tilings", "rate"),
    [
        ("h100-x2", ["2x96", "2x128", "2x128-staggered"], 2.9e6),
        ("h100-x4", ["2x64-staggered"], 2.9e6),
        ("h200-x2", ["2x128-staggered"], 4e6),
        ("h200-x4", ["2x64-staggered"], 4e6),
    ],
)
def test_the_persistent_kernel_is_foretold_with_a_factor_for_the_machines_tiles(machine, tilings, rate):
    rows = pd.read_csv(ROOT / "data" / machine / "linear_all_reduce.csv")
    rows = rows[rows["method"].isin(["persistent", "auto"]) & rows["correct"]]
    rows = rows.drop_duplicates(["layer", "m", "tiling"]).sort_values("time_us")
    num_points = 0
    for tiling in tilings:
        tiled = rows[rows["tiling"].fillna("").map(ascii_tiling).eq(tiling)]
        points = [(row.m, row.n, row.k // row.tp, row.time_us) for row in tiled.itertuples()]
        own = [persistent_time(*shape, parse_tiling(tiling), int(machine[-1]), 66, rate) for *shape, _ in points]
        problems, times_us = [Sides(1.0, 1.0, each) for each in own], [us for *_, us in points]
        known = Overlapped.of_own(problems[::3], times_us[::3])
        errors = [abs(known(problem) / us - 1) for problem, us in zip(problems, times_us, strict=True)]
        assert np.median(errors) < 0.035 and max(errors) < 0.1, tiling
        num_points += len(errors)
    assert num_points >= 18


def replayed(machine: str, seed: int) -> list[tuple[str, float]]:
    """Calibrated at some points of a stored table, chosen at the others: the plans that overlap, and how many times as
    long as the fastest sequential arm they took."""
    table = pd.read_csv(ROOT / "data" / machine / "linear_all_reduce.csv")
    table = table[table["operation"].eq("matmul_all_reduce") & table["correct"]]
    tp, points, measured = int(table["tp"].iloc[0]), {}, {}
    for (_, m), rows in table.groupby(["layer", "m"], sort=False):
        row, sequential = rows.iloc[0], rows["method"].str.startswith("sequential")
        shape = (m, row["n"], row["k"] // tp)
        points[shape] = row["t_matmul_us"], row["t_comm_us"], rows["time_us"][sequential].min()
        for _, own in rows[rows["method"].isin(HOPPER)].iterrows():
            if own["method"] == "decode" or parse_tiling(str(own["tiling"])) in TILINGS:
                tiling = ascii_tiling(own["tiling"]) if own["method"] == "persistent" else ""
                plan = LinearPlan(own["method"], tiling=tiling)
                measured.setdefault(plan, {})[shape] = own["time_us"]
    few, many = ([shape for shape in points if (shape[0] <= 64) == is_few] for is_few in (True, False))
    chooser = random.Random(seed)
    known = chooser.sample(few, 9) + chooser.sample(many, 8)
    t_matmul = [points[shape][0] for shape in known]
    matmul = MatmulTime.fit(known, t_matmul, 132, 2)
    sums = {
        m * n * 2: t_comm for (m, n, _), (_, t_comm, _) in sorted(points.items(), key=lambda it: it[0][0] * it[0][1])
    }
    curve = Curve(tuple(map(float, sums)), tuple(sums.values()))
    costs = LinearCosts(tp, ("torch.bfloat16",), matmul, {"nccl": curve}, {}, {})
    unseen = {
        shape: MatmulTime.fitted(*without(index, known, t_matmul), 132, 2)(*shape) for index, shape in enumerate(known)
    }
    for plan, times_us in measured.items():
        seen = [shape for shape in known if shape in times_us]
        if len(seen) >= MIN_POINTS:
            sides = [costs.sides(plan, *shape, *points[shape][:2]) for shape in seen]
            of_plan = [times_us[shape] for shape in seen], [unseen[shape] for shape in seen]
            costs.overlapped[plan] = Overlapped.fit(sides, *of_plan)
    found = []
    for shape in set(points) - set(known):
        usable = [plan for plan in costs.overlapped if shape in measured[plan]]
        plan = costs.choose(*shape, [NCCL, *usable], NCCL)
        if plan.overlapped:
            found.append((f"{shape}: {plan}", measured[plan][shape] / points[shape][2]))
    return found


@pytest.mark.parametrize(
    "machine",
    ["h100-x2", "h100-x4", "h200-x2", known_to_fail("h200-x4", "1 plan of 28 is 4 % slower, at 256 rows")],
)  # fmt: skip
def test_no_overlapping_plan_is_taken_untuned_that_is_slower_than_the_sequential_ones(machine):
    taken = [each for seed in range(4) for each in replayed(machine, seed)]
    assert len(taken) > 20 and [each for each in taken if each[1] > 1.02] == []


def costs_with(gain: float, spread: float = 0.05) -> LinearCosts:
    """A machine where the matmul and the push take 100 µs each for (1024, 1024, 1024), and overlapping `gain` less."""
    matmul = MatmulTime(0.0, 2 * 1024**3 / 100, 1e9, 0, 2, spread=0.1)
    curves = {name: Curve((2**10, 2**21), (us / 10, us)) for name, us in (("nccl", 130.0), ("maco_push_64", 100.0))}
    cost = Overlapped(100 - gain, 1, 0, least_us=50.0, spread=spread)
    return LinearCosts(2, ("torch.bfloat16",), matmul, curves, {CHUNKED: cost}, {})


def test_an_overlapping_plan_is_predicted_only_where_its_gain_exceeds_the_errors():
    shape, plans = (1024, 1024, 1024), [NCCL, PUSH, CHUNKED]
    for gain, spread, wanted in [(60, 0.05, CHUNKED), (60, 0.5, PUSH), (5, 0.05, PUSH), (-50, 0.0, PUSH)]:
        costs = costs_with(gain, spread)
        assert costs.predict(*shape) == pytest.approx({NCCL: 230.0, PUSH: 200.0, CHUNKED: 200.0 - gain})
        assert costs.choose(*shape, plans, NCCL) == wanted, (gain, spread)
    assert costs_with(60).choose(*shape, [NCCL, PUSH], NCCL) == PUSH
    assert costs_with(60).choose(*shape, [NCCL], NCCL) == NCCL
    # Far below what was measured nothing is predicted for a plan that overlaps.
    assert set(costs_with(60).predict(1, 64, 64)) == {NCCL, PUSH}
    costs = costs_with(60)
    costs.overlapped[LinearPlan("decode")] = Overlapped(scales=(1.1, 0.9), spread=0.1)
    costs.overlapped[LinearPlan("persistent", tiling="2x96")] = Overlapped(scales=(1.1,), spread=0.1)
    assert LinearCosts.from_json(json.loads(json.dumps(costs.to_json()))) == costs


def test_a_technique_that_sums_by_itself_is_foretold_by_its_own_formula():
    shapes = [(1, 4096, 2048), (4, 8192, 14336), (16, 8192, 4096), (64, 5120, 6144)]
    decode, matmul = LinearPlan("decode"), MatmulTime(3.0, 7e8, 4e6, 132, 2)
    costs = LinearCosts(2, ("torch.bfloat16",), matmul, {"nccl": Curve((2**10, 2**21), (16.0, 40.0))}, {}, {})
    sides = [costs.sides(decode, *shape, matmul(*shape), 16.0) for shape in shapes]
    times_us = [1.1 * decode_time(*shape, 2).scaled_us((1, 1)) for shape in shapes]
    costs.overlapped[decode] = Overlapped.fit(sides, times_us, [side.t_matmul for side in sides])
    wanted = 1.1 * decode_time(16, 5120, 12800, 2).scaled_us((1, 1))
    assert costs.predict(16, 5120, 12800)[decode] == pytest.approx(wanted)
    assert costs.choose(16, 5120, 12800, [NCCL, decode], NCCL) == decode
    assert costs.choose(16, 5120, 12800, [NCCL], NCCL) == NCCL
    assert 30 < wanted / 1.1 < 40  # 131 MB are read in no less


def test_a_backend_that_takes_no_more_bytes_is_not_predicted():
    costs = costs_with(60)
    costs.all_reduce["vllm_custom"] = Curve((2**10, 2**15), (4.0, 9.0))
    small, large = LinearPlan(backend="vllm_custom") in costs.predict(1, 1024, 1024), costs.predict(1024, 1024, 1024)
    assert small and LinearPlan(backend="vllm_custom") not in large


def test_every_technique_is_a_candidate_on_gpus_and_fused_ones_nowhere_else():
    assert {plan.technique for plan in candidates("cuda", ["nccl", "maco_push_64"])} == set(TECHNIQUES)
    assert {plan.technique for plan in candidates("cpu", ["gloo"])} == {"sequential", "chunked"}


def test_the_shortlist_has_the_default_the_near_ones_and_the_best_of_every_technique():
    plans = candidates("cuda", ["nccl", "symm_mem_one_shot", "maco_staged_8", "maco_push_64"])
    predicted = {plan: 100.0 + 20 * number for number, plan in enumerate(plans)}
    chosen = shortlist(predicted, plans, NCCL)
    assert chosen[0] == NCCL and LinearPlan(backend="symm_mem_one_shot") in chosen
    assert all(predicted[plan] <= 130 for plan in chosen)
    overlapping = [plan for plan in plans if plan.overlapped]
    near = predicted | {plan: 90.0 + number for number, plan in enumerate(overlapping)}
    chosen = shortlist(near, plans, NCCL)
    assert {plan.technique for plan in chosen} == set(TECHNIQUES) and overlapping[0] in chosen
    assert len(chosen) < len(plans)
    assert set(shortlist({}, plans, NCCL)) == set(plans)  # nothing is known of such a type: all are measured


def test_the_persistent_kernel_takes_the_tiles_that_are_the_fastest_on_this_machine():
    """Which need not be those that constants of another machine say: calibration measures every tiling by itself."""
    shape, clusters = (8192, 5120, 12800), 66
    tiled = {tiling: LinearPlan("persistent", tiling=str(tiling)) for tiling in TILINGS}
    assert set(tiled.values()) < set(candidates("cuda", ["nccl"]))
    shapes = [(2**m, n, k) for m in (9, 11, 13) for n, k in ((4096, 2048), (8192, 8192))]
    costs = costs_with(0)
    costs = replace(costs, matmul=replace(costs.matmul, num_sms=2 * clusters), num_ranks=4, overlapped={})
    for fastest in (fastest_tiling(*shape, 4, clusters), Tiling(96, True), Tiling(128, True, True)):
        slower = {tiling: 1.0 if tiling == fastest else 1.3 for tiling in TILINGS}
        for tiling, plan in tiled.items():
            sides = [costs.sides(plan, *each, costs.matmul(*each), 100.0) for each in shapes]
            times_us = [each.own.scaled_us([slower[tiling]]) for each in sides]
            costs.overlapped[plan] = Overlapped.fit(sides, times_us, [each.t_matmul for each in sides])
            assert costs.overlapped[plan].scales == pytest.approx((slower[tiling],))
        predicted = costs.predict(*shape)
        assert predicted[tiled[fastest]] == pytest.approx(persistent_time(*shape, fastest, 4, clusters, 1e9).total)
        assert costs.choose(*shape, [NCCL, *tiled.values()], NCCL) == tiled[fastest]
        # Those that are near are measured when it is tuned.
        near = [plan for plan in tiled.values() if predicted[plan] < 1.3 * predicted[NCCL]]
        assert len(near) > 2 and set(near) <= set(shortlist(predicted, [NCCL, PUSH, *tiled.values()], NCCL))


def test_the_persistent_kernel_takes_no_less_than_reading_the_operands():
    few = persistent_time(256, 8192, 14336, Tiling(128, True, True), 2, 66)
    slow = persistent_time(256, 8192, 14336, Tiling(128, True, True), 2, 66, read_bytes_per_us=2e6)
    assert few.memory == 0 and slow.total > 8192 * 14336 * 2 / 2e6 > few.multiplied
    # Reading goes on beside multiplying, and is not slower where that is.
    assert slow.scaled_us([1.2]) < 1.1 * slow.total and few.scaled_us([1.2]) > 1.14 * few.total


def test_tuning_measures_the_persistent_kernel_in_every_tiling_that_may_be_the_fastest(monkeypatch):
    """The tiles that are fastest on a machine need not be those that its calibration foretells."""
    shape, clusters = (4096, 5120, 6400), 66
    costs = costs_with(0)
    tiled = [LinearPlan("persistent", tiling=str(tiling)) for tiling in TILINGS]
    cost = Overlapped(scales=(1.1,), spread=0.1)
    matmul = replace(costs.matmul, num_sms=2 * clusters)
    costs = replace(costs, matmul=matmul, num_ranks=4, overlapped=dict.fromkeys(tiled, cost))
    predicted = costs.predict(*shape)
    near = [plan for plan in tiled if predicted[plan] < 1.06 * min(predicted[plan] for plan in tiled)]
    assert len(near) > 2
    other = max(near, key=predicted.get)

    class Timed:
        def __init__(self, num_rows, weight, group):
            pass

        def fault(self, plan):
            return ""

        def times_us(self, plans, **options):
            assert set(near) <= set(plans) and LinearPlan("persistent") not in plans
            return 300.0, {plan: 390.0 if plan == other else 450.0 for plan in plans}

    monkeypatch.setattr(linear_auto, "Shape", Timed)
    monkeypatch.setattr(linear_auto, "sums", lambda *arguments: True)
    monkeypatch.setattr(LinearPlanner, "ran", lambda *arguments: None)
    monkeypatch.setattr(LinearPlanner, "group", dist.group)
    monkeypatch.setattr(LinearPlanner, "decide", lambda self, layer, num_rows, how: types.SimpleNamespace())
    planner = object.__new__(LinearPlanner)
    planner.device, planner.default = torch.device("cuda"), NCCL
    planner.calibration = types.SimpleNamespace(linear=costs)
    layer = linear_auto.Layer(*shape[1:], torch.bfloat16, even=True)
    decision = planner.tune(layer, shape[0], None, 0.1)
    assert decision.chosen == other
    assert decision.predicted_us[other] == pytest.approx(predicted[other])


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


def test_a_predicted_plan_is_one_for_the_rows_of_the_call_not_only_for_the_power_of_two_beside_them(monkeypatch):
    decode, asked = LinearPlan("decode"), []

    def predict_power(self, layer, num_rows):
        asked.append(num_rows)
        return decode if num_rows <= 64 else PUSH

    monkeypatch.setattr(LinearPlanner, "predict_power", predict_power)
    planner = object.__new__(LinearPlanner)
    planner.default = NCCL
    wanted = {1: decode, 3: decode, 64: decode, 65: PUSH, 75: PUSH, 90: PUSH, 91: PUSH, 128: PUSH}
    assert {num_rows: planner.predict(None, num_rows) for num_rows in wanted} == wanted
    assert asked == [1, 4, 64, 64, 128, 64, 128, 64, 128, 128, 128]
    monkeypatch.setattr(LinearPlanner, "predict_power", lambda self, layer, num_rows: decode)
    assert planner.predict(None, 75) == NCCL


def test_measured_plans_replace_the_simpler_ones_only_when_faster():
    assert keep({NCCL: 100.0, PUSH: 90.0, CHUNKED: 80.0}, NCCL) == CHUNKED
    assert keep({NCCL: 100.0, PUSH: 90.0, CHUNKED: 89.5}, NCCL) == PUSH
    assert keep({NCCL: 100.0, PUSH: 99.5, CHUNKED: math.inf}, NCCL) == NCCL


# -- on ranks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MACO_CACHE", str(tmp_path))


def small_grid() -> None:
    from maco_lib.overlap import calibration

    beside, matmuls = ((2**16, 64), (2**16, 128), (2**18, 64)), ((1, 64, 64), (64, 64, 64))
    linear = tuple(itertools.product((256, 512), (64, 128), (64, 128)))
    calibration.GRIDS["cpu"] = calibration.Grid((2**14, 2**18), beside, linear, matmuls, budget_s=0.01)


def watched() -> list[LinearPlan]:
    """The plans that calls follow from now on."""
    from maco_lib.overlap import linear

    followed: list[LinearPlan] = []
    for technique, run in list(linear.RUN.items()):
        linear.RUN[technique] = lambda problem, plan, run=run: (followed.append(plan), run(problem, plan))[1]
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
    from maco_lib.overlap.linear_measure import Shape

    small_grid()
    followed = watched()
    for num_rows in (300, 290, 7):
        check(rank, num_ranks, num_rows, 96, 64)
    (decision,) = told(256, "predicted")  # of both 300 and 290
    assert decision.n == 96 and decision.k == 32 and decision.t_comp_us > 0 and followed[-3] == decision.chosen
    # Whether the halves are long enough to be predicted is a matter of microseconds here.
    assert GLOO in decision.predicted_us and math.isnan(decision.error) and not decision.measured_us
    assert set(told(8, "predicted")[0].predicted_us) == {GLOO}  # 8 rows cannot be cut in chunks of tiles

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
        if found.chosen in found.predicted_us:
            assert found.error == pytest.approx(found.predicted_us[found.chosen] / found.measured_us[found.chosen] - 1)
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

    # Calls of changing shapes leave no more behind than there are powers of two.
    before = len(decisions())
    for num_rows in range(1, 1200, 13):
        linear_all_reduce(torch.randn(num_rows, 48), layer.weight)
    assert len(decisions()) - before <= 12


def uneven_shares_and_compiled(rank: int, num_ranks: int) -> None:
    small_grid()
    followed = watched()
    for num_rows in (5, 600):
        check(rank, num_ranks, num_rows, 80, 33)
    assert followed[-2:] == [GLOO, GLOO] and not told(512, "predicted")[0].predicted_us
    weight = torch.randn(80, 17 - rank)
    assert tune_linear(weight, [300])[300].chosen in (GLOO, HALVES)
    check(rank, num_ranks, 300, 80, 33)
    check(rank, num_ranks, 0, 80, 64)
    # Types that were not calibrated: the default, until they are tuned.
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
    from maco_lib.overlap.linear_auto import planner
    from maco_lib.overlap.linear_measure import Shape

    small_grid()
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


def test_auto_follows_what_was_measured_and_predicts_the_rest(cache):
    run_ranks(tuned_and_looked_up)


def test_auto_with_uneven_shares_other_types_and_compiled(cache):
    run_ranks(uneven_shares_and_compiled)


def test_a_capture_follows_only_what_has_run(cache):
    run_ranks(captured_as_if)


def test_a_group_of_one_has_nothing_to_tune():
    assert tune_linear(torch.ones(3, 4), [5]) == {}
    assert torch.equal(linear_all_reduce(torch.ones(2, 4), torch.ones(3, 4)), torch.full((2, 3), 4.0))


# -- on GPUs -----------------------------------------------------------------------------------------------------------


def captured(rank: int, num_ranks: int) -> None:
    """What was tuned or has run is captured with its plan; what was not, with the default and a warning."""
    from maco_lib.overlap.linear_measure import Shape

    device = torch.device("cuda", rank)
    weight, other = (torch.randn(1024, k, device=device, dtype=torch.bfloat16) for k in (512, 256))
    # Plans that are not the default's, whatever is the fastest here.
    times_us, predict = Shape.times_us, LinearPlanner.predict
    Shape.times_us = lambda self, plans, **rest: (1.0, {plan: 1.0 + (plan != plans[-1]) for plan in plans})
    LinearPlanner.predict = lambda self, layer, num_rows: PUSH
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
    Shape.times_us, LinearPlanner.predict = times_us, predict
    for dtype in (torch.float16, torch.float32):
        x, weight = torch.ones(300, 64, device=device, dtype=dtype), torch.ones(128, 64, device=device, dtype=dtype)
        assert (linear_all_reduce(x, weight) == 64 * num_ranks).all()
        found = tune_linear(weight, [300])[300]
        assert math.isfinite(found.measured_us[found.chosen])
        assert (linear_all_reduce(x, weight) == 64 * num_ranks).all()


@pytest.mark.gpu(num_gpus=2)
def test_auto_on_two_gpus(cache):
    run_ranks(captured, backend="nccl", timeout_s=240)
