"""How long a matmul of any size takes alone on one GPU, from a few measured ones. Without torch.

    T = fixed + side by side(operations in whole waves of tiles / rate, bytes / bandwidth)

Fitted by least squares of the logarithms' errors.
"""

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import scipy.optimize

from maco_lib.overlap.costs import MEMORY_NORM, side_by_side
from maco_lib.overlap.left_out import spread, without

# Tiles that cuBLAS multiplies in on Hopper: of such sides, and no larger. It takes those that fill the GPU better.
SIDES, MAX_TILE = (64, 96, 128, 160, 192, 256), 128 * 256
TILES = tuple((rows, columns) for rows in SIDES for columns in SIDES if rows * columns <= MAX_TILE)
# To load a row or column of a tile takes as long as to multiply so many elements. This and MEMORY_NORM: for the least
# error on the matmuls of h100-x2, h100-x4, h200-x2 and h200-x4 in section 5.
LOADED = 13


@functools.lru_cache(maxsize=4096)
def in_tiles(m: int, n: int, k: int, num_sms: int) -> float:
    """Operations that (m, k) @ (k, n) takes the time of: 2mnk, more where not every SM has a tile in the last wave, and
    for loading tiles; 2mnk where num_sms is 0."""
    if not num_sms:
        return 2.0 * m * n * k
    rounds = (
        -(-(-(-m // rows) * -(-n // columns)) // num_sms) * (rows * columns + LOADED * (rows + columns))
        for rows, columns in TILES
    )
    return 2.0 * k * num_sms * min(rounds)


@dataclass(frozen=True)
class MatmulTime:
    """The formula's constants for elements of `itemsize` bytes; spread: see `spread`. num_sms: 0 on a CPU."""

    fixed_us: float
    operations_per_us: float
    bytes_per_us: float
    num_sms: int
    itemsize: int
    spread: float = 0.0

    def __call__(self, m: int, n: int, k: int) -> float:
        """µs of (m, k) @ (k, n): operands read once, result written once."""
        moved = self.itemsize * (m * k + k * n + m * n)
        multiplied_us = in_tiles(m, n, k, self.num_sms) / self.operations_per_us
        return self.fixed_us + side_by_side(multiplied_us, moved / self.bytes_per_us, MEMORY_NORM)

    @classmethod
    def fit(cls, shapes: list[tuple[int, int, int]], times_us: list[float], num_sms: int, itemsize: int):
        """To measured times of matmuls (m, n, k)."""
        measured = np.array(times_us)
        fits = [cls.fitted(*without(i, shapes, times_us), num_sms, itemsize) for i in range(len(shapes))]
        error = spread([fit(*shape) for fit, shape in zip(fits, shapes, strict=True)], measured)
        return replace(cls.fitted(shapes, times_us, num_sms, itemsize), spread=error)

    @classmethod
    def fitted(cls, shapes: list[tuple[int, int, int]], times_us: list[float], num_sms: int, itemsize: int):
        """As `fit`, without its error."""
        points = list(zip(shapes, times_us, strict=True))

        def made(logs: np.ndarray) -> MatmulTime:
            return cls(*np.exp(logs).tolist(), num_sms, itemsize)

        def residual(logs: np.ndarray) -> list[float]:
            return [math.log(made(logs)(*shape) / us) for shape, us in points]

        fastest = [max(in_tiles(*shape, num_sms) / us for shape, us in points)]
        fastest.append(max(itemsize * shape[1] * shape[2] / us for shape, us in points))
        start = np.log([min(times_us) / 4, *fastest])
        return made(scipy.optimize.least_squares(residual, start).x)
