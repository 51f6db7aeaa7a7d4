"""How far a fit is off at what it was not fitted to: each point is left out once."""

from collections.abc import Sequence

import numpy as np

ERROR_QUANTILE = 0.9


def without(index: int, *lists: Sequence) -> tuple[list, ...]:
    """The lists without their element at `index`."""
    return tuple([*each[:index], *each[index + 1 :]] for each in lists)


def spread(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """90 % quantile of |log(predicted / measured)|."""
    return float(np.quantile(np.abs(np.log(np.divide(predicted, measured))), ERROR_QUANTILE))
