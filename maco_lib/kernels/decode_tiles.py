"""How `kernels.decode` cuts its matmul: the rows of x that it takes, and of the weight for each CTA. Without torch."""

# Of x.
MAX_ROWS = 64
# Of the weight, that a CTA multiplies at a time.
MAX_TILE_ROWS = 64


def padded_rows(num_rows: int) -> int:
    """The rows that are multiplied where x has so many: 8, 16, 32 or 64."""
    return max(8, 1 << (num_rows - 1).bit_length())


def tile_rows_of(num_columns: int, num_ctas: int) -> int:
    """How many of the weight's `num_columns` rows a CTA takes at a time, so that all take about as many."""
    tiles_each = -(-num_columns // (MAX_TILE_ROWS * num_ctas))
    return -(-num_columns // (num_ctas * tiles_each * 8)) * 8
