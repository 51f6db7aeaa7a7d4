"""Statistics of the study's timings: the library's interval of a median, ratios of paired samples, and verdicts."""

import math

import numpy as np
from numpy.typing import ArrayLike

from maco_lib.stats import check_confidence, median_interval, samples_array

__all__ = ["mean_interval", "median_interval", "paired_ratio", "verdict"]

MIN_BLOCKS = 5
STATISTICS = {"median": np.median, "mean": np.mean}


def mean_interval(
    samples: ArrayLike, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean with its percentile bootstrap interval: (mean, lo, hi). Reproducible: `seed` decides the resampling."""
    check_confidence(confidence)
    array = samples_array("samples", samples)
    draws = np.random.default_rng(seed).integers(array.size, size=(num_resamples, array.size))
    lo, hi = np.quantile(array[draws].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    mean = float(array.mean())
    return mean, min(float(lo), mean), max(float(hi), mean)


def paired_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    blocks: ArrayLike | None = None,
    *,
    statistic: str = "median",
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Ratio of the medians (or means) of two arms timed in the same blocks: (ratio, lo, hi).

    numerator, denominator: positive samples of equal number n; blocks: n labels, equally many samples in each block.
    Whole blocks are resampled, for both arms together, so slow drift of the machine widens the interval instead of
    biasing it. Fewer than 5 blocks say too little: then pairs are resampled, as without `blocks`. A single pair says
    nothing of the spread: (ratio, 0, inf). Reproducible: the resampling depends on `seed` only.
    """
    check_confidence(confidence)
    if statistic not in STATISTICS:
        raise ValueError(f"unknown statistic {statistic!r}; the statistics are {', '.join(STATISTICS)}")
    above, below = samples_array("numerator", numerator), samples_array("denominator", denominator)
    if above.size != below.size:
        raise ValueError(f"numerator has {above.size} samples and denominator {below.size}: they are not pairs")
    if min(above.min(), below.min()) <= 0:
        raise ValueError(f"samples must be positive, the smallest is {min(above.min(), below.min())}")
    of = STATISTICS[statistic]
    ratio = float(of(above) / of(below))
    if above.size == 1:
        return ratio, 0.0, math.inf
    members = block_members(above.size, blocks)
    draws = np.random.default_rng(seed).integers(len(members), size=(num_resamples, len(members)))
    picked = members[draws].reshape(num_resamples, -1)
    ratios = of(above[picked], axis=1) / of(below[picked], axis=1)
    lo, hi = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return ratio, min(float(lo), ratio), max(float(hi), ratio)


def block_members(num_samples: int, blocks: ArrayLike | None) -> np.ndarray:
    """Indices of the samples of each block, [block, member]; single samples where there are too few blocks."""
    singles = np.arange(num_samples)[:, None]
    if blocks is None:
        return singles
    labels = np.asarray(blocks).ravel()
    if labels.size != num_samples:
        raise ValueError(f"{labels.size} block labels for {num_samples} samples")
    names, counts = np.unique(labels, return_counts=True)
    if counts.min() != counts.max():
        raise ValueError(f"blocks differ in size: between {counts.min()} and {counts.max()} samples")
    if names.size < MIN_BLOCKS:
        return singles
    return np.argsort(labels, kind="stable").reshape(names.size, -1)


def verdict(ratio_lo: float, ratio_hi: float, margin: float = 0.01) -> str:
    """What the interval of a speedup says: "helps", "hurts", or "undecided" when it reaches within `margin` of 1."""
    if margin < 0:
        raise ValueError(f"margin = {margin!r} is negative")
    if not ratio_lo <= ratio_hi:
        raise ValueError(f"[{ratio_lo!r}, {ratio_hi!r}] is not an interval")
    if ratio_lo > 1 + margin:
        return "helps"
    if ratio_hi < 1 - margin:
        return "hurts"
    return "undecided"
