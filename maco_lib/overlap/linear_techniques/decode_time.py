"""How long a matmul of few rows that sends its product takes, and then the sum, from a few constants. Without torch.

    T = what is left when nothing is to be read or sent + the weight / the rate of reading + lines / the rate of sending

The constants were set by runs of some shapes on 2 H200s, not by table `linear_all_reduce`; calibration scales it all.
"""

ITEMSIZE = 2
FIXED_US, READ_BYTES_PER_US, SENT_BYTES_PER_US = 5.5, 4.6e6, 450e3


def predicted_us(m: int, n: int, k: int, num_ranks: int, num_clusters: int) -> float:
    """us of the slowest rank for x (m, k) and weight (n, k) of 2-byte elements."""
    sent = 2 * (num_ranks - 1) * m * n * ITEMSIZE
    return FIXED_US + n * k * ITEMSIZE / READ_BYTES_PER_US + sent / SENT_BYTES_PER_US
