"""A model of a collective and a computation that run side by side: bounds, overlapped time, fit, split.

With T_comm and T_comp each alone (any unit, the same everywhere):

- ideal = max(T_comm, T_comp): neither slows the other. sequential = T_comm + T_comp: one after the other.
- While both run, the collective takes σ_comm times as long and the computation σ_comp times as long; when one has
  ended, the rest of the other runs at full speed. The collective ends first if σ_comm·T_comm ≤ σ_comp·T_comp. Then a
  part σ_comm·T_comm / σ_comp of the computation is done, and the rest follows:

      T_overlap = δ + T_comp + σ_comm·T_comm·(1 − 1/σ_comp)        the collective ends first
      T_overlap = δ + T_comm + σ_comp·T_comp·(1 − 1/σ_comm)        the computation ends first

  δ is the fixed cost of forking to a second stream and joining it. The two cases meet where both end together. With
  σ = 1 and δ = 0 it is the ideal; overlapping pays where T_overlap < sequential.

Three numbers per technique and machine, fitted by least squares on the logarithm of T_overlap, so that a short point
counts as much as a long one. This module needs NumPy, SciPy and pandas only.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import scipy.optimize

from study.harness.stats import verdict

MAX_STRETCH = 10.0
MIN_TRAINING_POINTS = 3
# Points of one case only (the collective always ends first, say) fix σ_comm·(1 − 1/σ_comp) but not each; this weight,
# small beside a measurement's error, then makes the two sides slow alike.
PULL = 0.003
HELD_OUT_EVERY = 4


@dataclass(frozen=True)
class Stretch:
    """Fitted parameters of one technique: `sigma_comm`, `sigma_comp` ≥ 1, and `delta` ≥ 0 in the unit of the times.

    `spread` is the 90 % quantile of |log(predicted / measured)| over training points, each predicted by a fit without
    it; predictions carry the interval predicted·exp(∓spread).
    """

    sigma_comm: float
    sigma_comp: float
    delta: float
    spread: float = 0.0

    def predict(self, t_comm, t_comp) -> np.ndarray:
        """Overlapped time of a collective and a computation that take `t_comm` and `t_comp` alone; shapes broadcast."""
        return predict(t_comm, t_comp, self.sigma_comm, self.sigma_comp, self.delta)

    def interval(self, t_comm, t_comp) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest overlapped time that the fit's spread leaves likely."""
        middle = self.predict(t_comm, t_comp)
        return middle * np.exp(-self.spread), middle * np.exp(self.spread)


def ideal(t_comm, t_comp) -> np.ndarray:
    """The time if neither side slowed the other."""
    return np.maximum(t_comm, t_comp)


def sequential(t_comm, t_comp) -> np.ndarray:
    """The time of one after the other."""
    return np.add(t_comm, t_comp)


def predict(t_comm, t_comp, sigma_comm: float, sigma_comp: float, delta: float) -> np.ndarray:
    """T_overlap by the formula in this module's docstring; `t_comm`, `t_comp`, `delta` in the same unit."""
    comm, comp = np.asarray(t_comm, dtype=float), np.asarray(t_comp, dtype=float)
    comm_first = comp + sigma_comm * comm * (1 - 1 / sigma_comp)
    comp_first = comm + sigma_comp * comp * (1 - 1 / sigma_comm)
    return delta + np.where(sigma_comm * comm <= sigma_comp * comp, comm_first, comp_first)


def fit(t_comm, t_comp, t_overlap) -> Stretch:
    """Least-squares fit of σ_comm, σ_comp and δ to measured times (1-d, one entry per point, positive).

    Raises ValueError if there are fewer points than parameters or a time is not positive.
    """
    comm, comp, measured = (np.asarray(values, dtype=float) for values in (t_comm, t_comp, t_overlap))
    if len(measured) < MIN_TRAINING_POINTS:
        raise ValueError(f"{len(measured)} points cannot fit 3 parameters; measure at least {MIN_TRAINING_POINTS}")
    for name, values in (("t_comm", comm), ("t_comp", comp), ("t_overlap", measured)):
        if not (values > 0).all():
            raise ValueError(f"{name} holds {values[~(values > 0)][0]}; every time must be a positive number")
    # Which side ends first depends on the unknowns, so the error has several valleys: the lowest of a few starts
    # counts.
    starts = [(low, high, 0.01) for low in (1.05, 1.5, 3.0) for high in (1.05, 1.5, 3.0)]
    unknown = _least_squares(comm, comp, measured, starts)
    errors = []
    for i in range(len(measured)):
        others = (np.delete(values, i) for values in (comm, comp, measured))
        left_out = _stretch(_least_squares(*others, [unknown]), np.delete(measured, i))
        errors.append(abs(np.log(left_out.predict(comm[i], comp[i]) / measured[i])))
    return replace(_stretch(unknown, measured), spread=float(np.quantile(errors, 0.9)))


def _least_squares(comm: np.ndarray, comp: np.ndarray, measured: np.ndarray, starts: list) -> np.ndarray:
    # δ in units of the shortest time, so that the unknowns have like sizes; no join costs more than what is joined.
    unit = measured.min()

    def residual(unknown: np.ndarray) -> np.ndarray:
        sigma_comm, sigma_comp, delta = unknown
        errors = np.log(predict(comm, comp, sigma_comm, sigma_comp, delta * unit) / measured)
        return np.append(errors, PULL * np.log(sigma_comm / sigma_comp))

    bounds = ([1.0, 1.0, 0.0], [MAX_STRETCH, MAX_STRETCH, 1.0])
    fits = [scipy.optimize.least_squares(residual, start, bounds=bounds) for start in starts]
    return min(fits, key=lambda result: result.cost).x


def _stretch(unknown: np.ndarray, measured: np.ndarray) -> Stretch:
    return Stretch(float(unknown[0]), float(unknown[1]), float(unknown[2] * measured.min()))


def gain(
    t_comm: float, t_comp: float, stretch: Stretch, num_joins: int = 1, baseline_us: float | None = None
) -> dict[str, float | str]:
    """What overlapping can give where `num_joins` equal collectives sum to `t_comm`, each beside its part of `t_comp`.

    `comm_share` of the technique's own sequential time; `ideal_gain` if the shorter side vanished behind the longer
    one; predicted `gain` with its interval `gain_lo`, `gain_hi` and what that says (`verdict`). Gains are over
    `baseline_us`, the time without overlap by the default collective; None: by this one.
    """
    part = (t_comm / num_joins, t_comp / num_joins)
    total = t_comm + t_comp if baseline_us is None else baseline_us
    low, high = (num_joins * float(bound) for bound in stretch.interval(*part))
    return {
        "comm_share": t_comm / (t_comm + t_comp),
        "ideal_gain": total / max(t_comm, t_comp),
        "gain": total / (num_joins * float(stretch.predict(*part))),
        "gain_lo": total / high,
        "gain_hi": total / low,
        "verdict": verdict(total / high, total / low),
    }


def held_out(shapes: Iterable[str]) -> set[str]:
    """Which of the distinct `shapes` to keep out of the fit: every fourth one in the order of their SHA-256.

    The same shapes give the same split everywhere. Points of one shape (several techniques, a published configuration
    that is also in the sweep) are to share one name, or the fit would have seen what it is judged on.
    """
    ordered = sorted(set(shapes), key=lambda shape: hashlib.sha256(shape.encode()).hexdigest())
    return set(ordered[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
