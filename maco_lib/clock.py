"""The mean SM clock of each timed sample: what a GPU's power limit, not a program, takes from its speed.

Every SM's cycle counter and the time are read before and after a sample (`kernels/sm_clock.py`). Between the readings
lie a barrier of ranks that have just met, some µs at another clock, and the sample.
"""

import math

import numpy as np
import torch


class ClockReadings:
    """Readings before and after each of a few samples, issued on the current stream of a GPU."""

    def __init__(self, num_samples: int, device: torch.device):
        from maco_lib.kernels import sm_clock  # there is no Triton where there is no GPU

        self.readings = torch.zeros(num_samples, 2, sm_clock.MAX_SMS, 2, dtype=torch.int64, device=device)
        self._read = sm_clock.read_sm_clocks

    def before(self, sample: int) -> None:
        self._read(self.readings[sample, 0])

    def after(self, sample: int) -> None:
        self._read(self.readings[sample, 1])

    def mhz(self) -> list[float]:
        """The mean clock of each sample; waits for the GPU."""
        return [mean_clock_mhz(before, after) for before, after in self.readings.cpu().numpy()]


def mean_clock_mhz(before: np.ndarray, after: np.ndarray) -> float:
    """The mean clock between two readings: the median over the SMs that are in both, NaN where none is.

    before, after: (SMs, 2) int64, the cycles and the ns of each SM; zeros where it was not read.
    """
    seen = (before[:, 1] > 0) & (after[:, 1] > 0)
    if not seen.any():
        return math.nan
    cycles, nanoseconds = (after - before)[seen].T
    return float(np.median(1e3 * cycles / nanoseconds))


def lowest_mhz(clocks: list[list[float]]) -> float:
    """The median over the samples of the lowest clock of any rank, for which the group waits; NaN without any.

    clocks: [rank][sample] in MHz; a sample that has no clock on some rank counts for nothing.
    """
    lowest = np.min(clocks, axis=0) if clocks else np.array([])
    lowest = lowest[~np.isnan(lowest)]
    return float(np.median(lowest)) if lowest.size else math.nan
