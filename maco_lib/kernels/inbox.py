"""Where a rank's peers leave data for it: what its inbox has room for, and the blocks of what goes in long lines.

An inbox is two halves, used in turn; of each, LINE_BYTES are for lines of 16 bytes (`kernels.lines`), LONG_BYTES for
long ones of 128 (`kernels.ll128`). Without Triton.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from maco_lib.kernels.launch import Launches

# Data of a line of 16 bytes: a word.
LINE_DATA = 8
LINE_BYTES, LONG_BYTES = 2**23, 2**24
HALF_BYTES = LINE_BYTES + LONG_BYTES
INBOX_BYTES = 2 * HALF_BYTES
# A launch adds one more than this to the inbox's counter, whatever its number of CTAs, which is no more than this.
MAX_CTAS = 1023

# Words of data in a long line, its bytes, and the lines that a warp writes at once.
LONG_WORDS, LONG_LINE, LINES_OF_WARP = 15, 128, 4
# More warps in a CTA would leave too few registers, more lines of a thread too.
MAX_WARPS, MAX_PASSES = 24, 4
# The block of a sum without rows: fewer than MAX_CTAS of them, and 16 warps.
BLOCK_WORDS = 16 * LINES_OF_WARP * LONG_WORDS


def shape_of(block_words: int) -> tuple[int, int]:
    """(warps of a CTA, long lines of a thread) that have room for a block of so many words."""
    units = -(-block_words // (LONG_WORDS * LINES_OF_WARP))
    passes = -(-units // MAX_WARPS)
    return -(-units // passes), passes


def has_room(num_blocks: int, block_words: int, num_ranks: int, one_shot: bool) -> bool:
    """Whether registers, the count of CTAs and the inbox have room for so many blocks in long lines."""
    others, owned = num_ranks - 1, -(-num_blocks // num_ranks)
    num_slots = others * num_blocks if one_shot else others * owned + num_blocks
    in_inbox = num_slots * -(-block_words // LONG_WORDS) * LONG_LINE <= LONG_BYTES
    return num_blocks <= MAX_CTAS and in_inbox and shape_of(block_words)[1] <= MAX_PASSES


@dataclass
class Box:
    """What kernels need to know of a group's inboxes.

    inboxes: the address of each rank's, beginning with the next rank, own last; counter: the address of an int64, this
    rank's own, of the launches on its inbox; rank: this one; watch: as in `patience.cuh`; launches: those prepared;
    together(key): waits on the host, the first time for a key, until every rank has come as far.
    """

    inboxes: tuple[int, ...]
    counter: int
    rank: int
    watch: int
    device_index: int
    launches: Launches = field(default_factory=Launches)
    together: Callable[[Hashable], None] = lambda key: None
