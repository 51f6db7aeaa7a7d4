"""How long a matmul of few rows that sends its product takes, and then the sum, from a few constants. Without torch.

    T = what is left when nothing is to be read or sent + lines / the rate of sending + the weight / the rate of reading

The constants were set by runs of some shapes on 2 H200s, not by table `linear_all_reduce`. Calibration scales the last
term, which is the memory's, apart from the others: GPUs of one kind differ in it.
"""

ITEMSIZE = 2
FIXED_US, READ_BYTES_PER_US, SENT_BYTES_PER_US = 5.5, 4.6e6, 450e3


def terms_us(m: int, n: int, k: int, num_ranks: int, num_clusters: int) -> tuple[float, float]:
    """us of the slowest rank for x (m, k) and weight (n, k) of 2-byte elements: all but reading, and reading."""
    sent = 2 * (num_ranks - 1) * m * n * ITEMSIZE
    return FIXED_US + sent / SENT_BYTES_PER_US, n * k * ITEMSIZE / READ_BYTES_PER_US
