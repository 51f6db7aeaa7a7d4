"""Properties of the statistics behind every interval and verdict of the report."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from study.harness import stats

POSITIVE = st.floats(0.1, 1e6, allow_nan=False)
SAMPLES = st.lists(POSITIVE, min_size=1, max_size=60)


@given(SAMPLES)
def test_median_interval_holds_the_median_and_is_made_of_samples(samples):
    median, lo, hi = stats.median_interval(samples)
    assert lo <= median <= hi
    assert lo in samples and hi in samples


@given(SAMPLES, st.floats(0.01, 100))
def test_median_interval_scales_with_the_unit(samples, factor):
    expected = [factor * value for value in stats.median_interval(samples)]
    assert np.allclose(stats.median_interval(np.asarray(samples) * factor), expected)


def test_few_samples_give_their_extremes_and_many_give_the_textbook_ranks():
    assert stats.median_interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert stats.median_interval([7.0]) == (7.0, 7.0, 7.0)
    # n = 100: order statistics 40 and 61 (Conover, Practical Nonparametric Statistics).
    assert stats.median_interval(range(1, 101)) == (50.5, 40.0, 61.0)


@pytest.mark.parametrize("num_samples", [6, 15, 40])
def test_median_interval_covers_at_least_as_often_as_promised(num_samples):
    draws = np.random.default_rng(1).lognormal(size=(1500, num_samples))
    covered = [lo <= 1.0 <= hi for _, lo, hi in map(stats.median_interval, draws)]
    assert np.mean(covered) > 0.935


def test_an_outlier_moves_the_mean_interval_but_not_the_median_interval():
    calm = np.random.default_rng(2).normal(100, 1, 99)
    spiked = [*calm, 1e6]
    assert stats.median_interval(spiked)[2] < 102
    assert stats.mean_interval(spiked)[2] > 1000


@settings(deadline=None)
@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=30))
def test_paired_ratio_holds_its_ratio_and_is_reproducible(pairs):
    above, below = zip(*pairs, strict=True)
    result = stats.paired_ratio(above, below, num_resamples=100)
    assert result == stats.paired_ratio(above, below, num_resamples=100)
    assert result[1] <= result[0] <= result[2]
    assert math.isclose(result[0], np.median(above) / np.median(below))


@settings(deadline=None)
@given(st.lists(POSITIVE, min_size=2, max_size=30), st.floats(0.5, 2))
def test_a_constant_ratio_is_known_exactly(samples, factor):
    result = stats.paired_ratio(np.asarray(samples) * factor, samples, num_resamples=100)
    assert np.allclose(result, factor)


def test_drift_between_blocks_widens_the_interval_only_when_blocks_are_given():
    rng = np.random.default_rng(3)
    blocks = np.repeat(np.arange(10), 20)
    above = rng.normal(100, 1, 200) * rng.normal(1, 0.1, 10)[blocks]
    below = rng.normal(100, 1, 200)
    _, lo, hi = stats.paired_ratio(above, below, blocks)
    _, narrow_lo, narrow_hi = stats.paired_ratio(above, below)
    assert hi - lo > 1.5 * (narrow_hi - narrow_lo)


def test_a_single_pair_decides_nothing():
    ratio, lo, hi = stats.paired_ratio([2.0], [1.0])
    assert (ratio, lo, hi) == (2.0, 0.0, math.inf)
    assert stats.verdict(lo, hi) == "undecided"


@given(POSITIVE, POSITIVE, st.floats(0, 0.5))
def test_verdict_is_antisymmetric_and_undecided_around_one(first, second, margin):
    lo, hi = sorted((first, second))
    verdict = stats.verdict(lo, hi, margin)
    if lo <= 1 <= hi:
        assert verdict == "undecided"
    if verdict != "undecided":
        assert verdict == ("helps" if lo > 1 else "hurts")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.median_interval([]), "no samples"),
        (lambda: stats.median_interval([1.0, math.nan]), "1 NaN among 2"),
        (lambda: stats.median_interval([1.0], confidence=95), "95"),
        (lambda: stats.paired_ratio([1.0, 2.0], [1.0]), "2 samples and denominator 1"),
        (lambda: stats.paired_ratio([1.0], [0.0]), "positive"),
        (lambda: stats.paired_ratio([1.0] * 3, [1.0] * 3, [0, 0, 1]), "between 1 and 2"),
        (lambda: stats.paired_ratio([1.0], [1.0], statistic="mode"), "median, mean"),
        (lambda: stats.verdict(2.0, 1.0), "not an interval"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
