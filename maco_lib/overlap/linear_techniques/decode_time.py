"""How long a matmul of few rows that sends its product takes, and then the sum, from a few constants. Without torch.

    T = what is left when nothing is to be read or sent + lines / the rate of sending + the weight / the rate of reading

The constants were set by runs of some shapes on 2 H200s; the rate of sending by table `linear_all_reduce` of h100-x2,
h100-x4, h200-x2 and h200-x4 as of commit 3e269fb. Calibration scales the last term, which is the memory's, apart from
the others: GPUs of one kind differ in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

ITEMSIZE = 2
FIXED_US, READ_BYTES_PER_US, SENT_BYTES_PER_US = 5.5, 4.6e6, 330e3


@dataclass(frozen=True)
class DecodeTime:
    """In µs, of the slowest rank. reading: the weight; rest: all else."""

    rest: float
    reading: float
    num_scales: ClassVar[int] = 2

    def scaled_us(self, scales: Sequence[float]) -> float:
        """If they took so many times as long, in this order."""
        return scales[0] * self.rest + scales[1] * self.reading


def decode_time(m: int, n: int, k: int, num_ranks: int) -> DecodeTime:
    """For x (m, k) and weight (n, k) of 2-byte elements on each rank."""
    sent = 2 * (num_ranks - 1) * m * n * ITEMSIZE
    return DecodeTime(FIXED_US + sent / SENT_BYTES_PER_US, n * k * ITEMSIZE / READ_BYTES_PER_US)
