"""Times at measured sizes and between them, and the time of two things that go on at once."""

import math
from dataclasses import dataclass

import numpy as np


def side_by_side(one_us: float, other_us: float, norm: float) -> float:
    """What two take that go on at the same time: the longer, and more where they take equally long."""
    return (one_us**norm + other_us**norm) ** (1 / norm)


@dataclass(frozen=True)
class Curve:
    """Times in µs at measured sizes.

    Straight lines between them in logarithms of both; constant below the least, proportional above the greatest.
    """

    sizes: tuple[float, ...]
    times_us: tuple[float, ...]

    def __call__(self, size: float) -> float:
        if size > self.sizes[-1]:
            return self.times_us[-1] * size / self.sizes[-1]
        return math.exp(np.interp(math.log(size), np.log(self.sizes), np.log(self.times_us)))

    def without(self, index: int) -> "Curve":
        """The same without its measured size number `index`."""
        return Curve(*(tuple(np.delete(values, index).tolist()) for values in (self.sizes, self.times_us)))

    def left_out_error(self) -> float:
        """Median |predicted / measured − 1| of the inner sizes, each predicted from the others; NaN below 3 sizes."""
        errors = [abs(self.without(i)(self.sizes[i]) / self.times_us[i] - 1) for i in range(1, len(self.sizes) - 1)]
        return float(np.median(errors)) if errors else math.nan
