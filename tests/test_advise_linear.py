"""Advice on a row-parallel layer: the nearest measured shape, said how near, and nothing made up."""

import pandas as pd
import pytest

from study.commands import advise_linear
from study.commands.advise_linear import advice, row_parallel


def rows() -> pd.DataFrame:
    common = {"operation": "matmul_all_reduce", "method": "auto", "correct": True, "tp": 2, "plan": "persistent"}
    times = {"t_base_us": 200.0, "time_us": 100.0, "fraction_of_ideal": 0.8, "t_matmul_us": 75.0}
    shapes = [("narrow", 1024, 4096, 4096), ("narrow", 4096, 4096, 4096), ("wide", 4096, 8192, 28672)]
    made = [{**common, **times, "layer": layer, "m": m, "n": n, "k": k} for layer, m, n, k in shapes]
    failed = {**made[1], "correct": False, "time_us": float("nan"), "m": 2000}
    return pd.DataFrame([*made, failed, {**made[1], "method": "persistent", "time_us": 1.0, "m": 2001}])


def test_the_nearest_measured_shape_is_named_with_its_distance():
    exact = advice(rows(), {"": (4096, 4096, 4096)}, 2, "some-machine")
    assert "200.0 µs" in exact and "100.0 µs by persistent: 2.00x, 80% of the ideal" in exact
    assert "narrow, M = 4096: your shape" in exact
    near = advice(rows(), {"": (2001, 4096, 2048)}, 2, "some-machine")
    assert "narrow, M = 1024: 0.512 times your m, 2 times your k" in near  # not the failed one, nor another method's
    assert "wide, M = 4096" in advice(rows(), {"": (4096, 8192, 16384)}, 2, "some-machine")


def test_what_was_not_measured_is_said():
    assert "not measured with tp 4" in advice(rows(), {"": (1, 1, 1)}, 4, "some-machine")
    assert "not measured on some-machine" in advice(None, {"": (1, 1, 1)}, 2, "some-machine")


def test_a_model_has_two_row_parallel_layers():
    shapes = row_parallel("Qwen3-32B", 7)
    assert shapes == {"o_proj": (7, 5120, 8192), "down_proj": (7, 5120, 25600)}
    text = advice(rows(), shapes, 2, "some-machine")
    assert "o_proj: " in text and "down_proj: " in text and advise_linear.USAGE in text
    with pytest.raises(ValueError, match="Qwen4"):
        row_parallel("Qwen4", 1)
