"""The overlap model: bounds, recovery of what generated the data, split, verdict; costs from tables."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from study.costs import AllReduceCost, Curve, MatmulCost
from study.sections.when_to_overlap import model

TIMES = st.floats(1e-1, 1e5)
STRETCHES = st.floats(1.0, 10.0)


@given(TIMES, TIMES, STRETCHES, STRETCHES, st.floats(0, 1e3))
def test_prediction_lies_between_ideal_and_both_stretched(t_comm, t_comp, sigma_comm, sigma_comp, delta):
    predicted = model.predict(t_comm, t_comp, sigma_comm, sigma_comp, delta)
    assert predicted >= model.ideal(t_comm, t_comp) + delta - 1e-9 * predicted
    # Neither side can end before its time alone, nor take longer than wholly stretched.
    assert predicted <= delta + max(sigma_comm * t_comm, sigma_comp * t_comp) * (1 + 1e-9)


@given(TIMES, TIMES, STRETCHES, STRETCHES)
def test_prediction_agrees_with_a_step_by_step_simulation(t_comm, t_comp, sigma_comm, sigma_comp):
    both = min(sigma_comm * t_comm, sigma_comp * t_comp)
    rest = max(t_comm - both / sigma_comm, t_comp - both / sigma_comp)
    assert model.predict(t_comm, t_comp, sigma_comm, sigma_comp, 0) == pytest.approx(both + rest, rel=1e-9)


@pytest.mark.parametrize("truth", [(1.0, 1.0, 0.0), (1.3, 1.15, 4.0), (2.5, 1.05, 12.0)])
def test_fit_recovers_the_parameters_that_made_the_data(truth):
    t_comm, t_comp = (grid.ravel() for grid in np.meshgrid([40.0, 110.0, 220.0, 900.0], [6.0, 25.0, 178.0, 1640.0]))
    stretch = model.fit(t_comm, t_comp, model.predict(t_comm, t_comp, *truth))
    assert stretch.predict(t_comm, t_comp) == pytest.approx(model.predict(t_comm, t_comp, *truth), rel=1e-3)
    assert (stretch.sigma_comm, stretch.sigma_comp, stretch.delta) == pytest.approx(truth, rel=0.02, abs=0.02)
    assert stretch.spread < 1e-2


def test_spread_tells_a_bad_model_from_a_good_one():
    rng = np.random.default_rng(0)
    t_comm, t_comp = (grid.ravel() for grid in np.meshgrid([40.0, 110.0, 220.0], [6.0, 25.0, 178.0]))
    noisy = model.predict(t_comm, t_comp, 1.2, 1.2, 2.0) * np.exp(rng.normal(0, 0.2, t_comm.size))
    stretch = model.fit(t_comm, t_comp, noisy)
    assert 0.1 < stretch.spread < 0.8
    low, high = stretch.interval(50.0, 50.0)
    assert low < stretch.predict(50.0, 50.0) < high


def test_fit_refuses_too_few_points_and_impossible_times():
    with pytest.raises(ValueError, match="2 points cannot fit 3"):
        model.fit([1, 2], [1, 2], [1, 2])
    with pytest.raises(ValueError, match="t_comp holds 0.0"):
        model.fit([1, 2, 3, 4], [1, 0, 3, 4], [1, 2, 3, 4])


def test_split_depends_on_the_set_of_shapes_only():
    shapes = [f"{size}-{n}" for size in (8, 32, 64, 128) for n in (1024, 2048, 4096)]
    kept_out = model.held_out(shapes)
    assert kept_out == model.held_out(reversed(shapes * 2))
    assert len(kept_out) == 3 and kept_out < set(shapes)


def bandwidth_table(ranks: int) -> pd.DataFrame:
    sizes = 2.0 ** np.arange(13, 31, 2)
    time_us = 15 + 2 * (ranks - 1) / ranks * sizes / 350e3
    algbw = sizes / time_us / 1e3
    return pd.DataFrame({
        "collective": "all_reduce", "backend": "nccl", "bytes": sizes, "time_us": time_us, "correct": True,
        "algbw_gb_per_s": algbw, "busbw_gb_per_s": algbw * 2 * (ranks - 1) / ranks,
    })  # fmt: skip


def test_all_reduce_cost_follows_the_measured_curve():
    cost = AllReduceCost.from_bandwidth(bandwidth_table(4))
    assert cost.ranks == 4
    assert cost.time_us(2**13) == pytest.approx(15, rel=0.01)
    assert cost.time_us(2**29) == pytest.approx(15 + 1.5 * 2**29 / 350e3, rel=1e-6)
    assert cost.time_us(2**31) == pytest.approx(2 * cost.time_us(2**30))
    # Fewer ranks move fewer bytes over each link.
    assert cost.time_us(2**29, ranks=2) == pytest.approx(15 + 2**29 / 350e3, rel=0.05)
    assert cost.curve.left_out_error() < 0.25
    with pytest.raises(ValueError, match="0 correct all_reduce sizes of backend 'gloo'"):
        AllReduceCost.from_bandwidth(bandwidth_table(4), "gloo")


def test_sizes_beyond_either_end_of_those_measured_are_not_covered():
    cost = AllReduceCost.from_bandwidth(bandwidth_table(4))
    least, greatest = cost.curve.sizes[0], cost.curve.sizes[-1]
    assert [cost.covers(size) for size in (least / 2, least, greatest, 2 * greatest)] == [False, True, True, False]
    assert not cost.covers(least, ranks=2)  # fewer ranks move fewer bytes: as of a smaller tensor


def environment_table() -> pd.DataFrame:
    shapes = [(n, n, n) for n in (1024, 2048, 4096, 8192)] + [(1, 8192, 8192)]
    rows = [
        {"quantity": "matmul", "dtype": "bf16", "m": m, "n": n, "k": k, "threads": 0, "value": 700.0,
         "time_us": max(6.0, 2 * m * n * k / 700e6, 2 * (m * k + k * n + m * n) / 4e6), "error": ""}
        for m, n, k in shapes
    ]  # fmt: skip
    copy = {"quantity": "memory_copy", "dtype": "", "threads": 0, "value": 4000.0, "time_us": 100.0, "error": ""}
    return pd.DataFrame([*rows, copy])


def test_matmul_cost_is_the_measured_roofline():
    cost = MatmulCost.from_environment(environment_table())
    assert cost.time_us(4096, 4096, 4096) == pytest.approx(2 * 4096**3 / 700e6, rel=1e-6)
    assert cost.time_us(1, 4096, 12288) == pytest.approx(2 * 4096 * 12288 / 4e6, rel=0.01)
    assert cost.time_us(1, 128, 128) == pytest.approx(6.0, rel=0.05)
    assert cost.error == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="no square matmul of dtype 'fp32'"):
        MatmulCost.from_environment(environment_table(), "fp32")


def test_curve_without_inner_points_has_no_error_to_tell():
    assert math.isnan(Curve((1.0, 2.0), (1.0, 2.0)).left_out_error())


def test_points_of_one_case_make_both_sides_slow_alike():
    t_comm, t_comp = np.array([10.0, 20.0, 30.0, 40.0]), np.array([500.0, 600.0, 900.0, 2000.0])
    stretch = model.fit(t_comm, t_comp, model.predict(t_comm, t_comp, 2.0, 1.25, 0.0))
    assert stretch.sigma_comm == pytest.approx(stretch.sigma_comp, rel=0.02)
    assert stretch.predict(t_comm, t_comp) == pytest.approx(t_comp + 0.4 * t_comm, rel=1e-3)


def test_a_slow_collective_that_hides_well_does_not_count_as_a_gain():
    stretch = model.Stretch(1.0, 1.0, 0.0)
    assert model.gain(100.0, 100.0, stretch)["gain"] == pytest.approx(2.0)
    slow = model.gain(300.0, 100.0, stretch, baseline_us=100.0 + 100.0)
    assert slow["gain"] == pytest.approx(200 / 300) and slow["verdict"] == "hurts"
