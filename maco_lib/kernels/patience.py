"""How long a kernel waits for a peer before it gives up: of Triton's kernels what `patience.cuh` is of CUDA's.

A word, `who`, tells the host which kernel gave up and which rank it waited for: `code(kernel, rank)`.
"""

# Of a word: the bits of the rank, and 1 above them, so that it is never 0.
RANK_BITS = 8
KERNELS = ("sum_shares", "add_share", "push_two_shot", "one_shot", "take_sum", "take_norm", "ll128", "persistent")


def code(kernel: str, rank: int = 0) -> int:
    """What the kernel writes where it waited for that rank; rank may be added."""
    return (KERNELS.index(kernel) + 1) << RANK_BITS | rank


def decoded(word: int) -> tuple[str, int]:
    """(kernel, rank) of a `code`."""
    return KERNELS[(word >> RANK_BITS) - 1], word & (1 << RANK_BITS) - 1
