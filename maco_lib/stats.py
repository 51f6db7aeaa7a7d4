"""Statistics of timings: how many samples to take, and a median with its interval."""

import math

import numpy as np
from numpy.typing import ArrayLike

# Where the fewest samples asked for take longer than so many budgets, fewer are taken, but not below LEAST_SAMPLES.
PATIENCE = 3.0
LEAST_SAMPLES = 3


def num_samples(fitting: float, least: int, most: int) -> int:
    """Samples of each arm where `fitting` rounds over all arms fit into the budget, `least` to `most` are asked for."""
    patient = max(LEAST_SAMPLES, int(PATIENCE * fitting))
    return min(most, max(int(fitting), min(least, patient)))


def samples_array(name: str, samples: ArrayLike) -> np.ndarray:
    """`samples` as a flat float64 array; raises ValueError when it is empty or holds a NaN."""
    array = np.asarray(samples, dtype=np.float64).ravel()
    if array.size == 0:
        raise ValueError(f"{name} holds no samples")
    if np.isnan(array).any():
        raise ValueError(f"{name} holds {int(np.isnan(array).sum())} NaN among {array.size} samples")
    return array


def check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence!r} is not between 0 and 1")


def interval_rank(num_samples: int, confidence: float) -> int:
    """Largest k such that the k-th smallest and k-th largest of `num_samples` cover the median so surely; else 1.

    The number of samples below the median is Binomial(n, 1/2), so the pair misses it with probability 2 P(X <= k - 1).
    """
    log_half = num_samples * math.log(0.5)
    below, rank = 0.0, 1
    for k in range(1, num_samples // 2 + 1):
        drawn = k - 1
        log_choose = math.lgamma(num_samples + 1) - math.lgamma(drawn + 1) - math.lgamma(num_samples - drawn + 1)
        below += math.exp(log_choose + log_half)
        if 2 * below > 1 - confidence:
            break
        rank = k
    return rank


def median_interval(samples: ArrayLike, confidence: float = 0.95) -> tuple[float, float, float]:
    """Median of independent samples with its rank-based interval: (median, lo, hi), in the unit of the samples.

    The bounds are order statistics (binomial), so outliers and skew do no harm. With few samples no pair of them
    reaches the confidence: for n < 6 at 95 % the bounds are the smallest and the largest sample, which cover the median
    with probability 1 - 2^(1-n) only, and a single sample is its own interval. Raises ValueError on no samples or NaN.
    """
    check_confidence(confidence)
    ordered = np.sort(samples_array("samples", samples))
    rank = interval_rank(ordered.size, confidence)
    return float(np.median(ordered)), float(ordered[rank - 1]), float(ordered[-rank])
