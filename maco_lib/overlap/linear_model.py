"""What a machine's calibration says of `linear_all_reduce`: how long each plan takes for (M, N, K), and which to take.

    T_matmul     = fixed + max(operations of whole waves of tiles / rate, bytes / bandwidth)
    T_comm       = a curve through measured sizes, of each backend: from the product to the result, what a sum costs
    sequential   = T_matmul + T_comm
    overlapping  = fixed + a·max(T_matmul, T_comm) + b·min(T_matmul, T_comm)

a: how much slower than alone the longer side is (a kernel that multiplies worse than cuBLAS, SMs taken from the
matmul); b: the part of the shorter side that is not hidden (1/C of C chunks, at best); fixed: launches, waits, the last
tile's way. Fitted for each overlapping plan by least squares of relative errors. Without torch.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.optimize

from maco_lib.overlap.costs import Curve
from maco_lib.overlap.linear_plan import LinearPlan
from maco_lib.overlap.plan import MARGIN

# Tiles that cuBLAS multiplies in on Hopper, of which it takes those that fill the GPU better; and those of few rows.
TILES = ((128, 256), (128, 128))
FEW_ROWS, SMALL_TILES = 64, ((64, 64),)
MIN_POINTS = 4
ERROR_QUANTILE = 0.9
# What `tune_linear` measures: sequential plans predicted within SLACK of the best of them, at most so many, and as many
# overlapping ones that are predicted within SLACK of that.
SLACK = 1.3
MAX_OF_A_KIND = 6


def spread(fit: Callable[[np.ndarray], Callable[[int], float]], measured: np.ndarray) -> float:
    """90 % quantile of |log(predicted / measured)|, every point predicted by `fit(the others' indices)`."""
    every = np.arange(len(measured))
    errors = [abs(math.log(fit(np.delete(every, i))(i) / measured[i])) for i in every]
    return float(np.quantile(errors, ERROR_QUANTILE))


def whole_waves(m: int, n: int, k: int, num_sms: int) -> float:
    """Operations of (m, k) @ (k, n) if every SM multiplies a tile in the last wave, too; 2mnk where num_sms is 0."""
    if not num_sms:
        return 2.0 * m * n * k
    tiles = SMALL_TILES if m <= FEW_ROWS else TILES
    rounds = (-(-(-(-m // rows) * -(-n // columns)) // num_sms) * rows * columns for rows, columns in tiles)
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
        operations = whole_waves(m, n, k, self.num_sms)
        return self.fixed_us + max(operations / self.operations_per_us, moved / self.bytes_per_us)

    @classmethod
    def fit(cls, shapes: list[tuple[int, int, int]], times_us: list[float], num_sms: int, itemsize: int):
        """To measured times of matmuls (m, n, k)."""
        measured = np.array(times_us)

        def fitted(chosen: np.ndarray) -> "MatmulTime":
            def made(logs: np.ndarray) -> MatmulTime:
                return cls(*np.exp(logs).tolist(), num_sms, itemsize)

            def residual(logs: np.ndarray) -> list[float]:
                return [math.log(made(logs)(*shapes[i]) / measured[i]) for i in chosen]

            fastest = [max(whole_waves(*shapes[i], num_sms) / measured[i] for i in chosen)]
            fastest.append(max(itemsize * shapes[i][1] * shapes[i][2] / measured[i] for i in chosen))
            start = np.log([measured[chosen].min() / 4, *fastest])
            return made(scipy.optimize.least_squares(residual, start).x)

        whole = fitted(np.arange(len(measured)))
        error = spread(lambda others: lambda i: fitted(others)(*shapes[i]), measured)
        return cls(**{**asdict(whole), "spread": error})


@dataclass(frozen=True)
class Overlapped:
    """The formula's constants for one plan. least_us: the shortest T_matmul + T_comm that it was fitted to, below
    which it predicts nothing; spread: see `spread`."""

    fixed_us: float
    longer: float
    shorter: float
    least_us: float = 0.0
    spread: float = 0.0

    def __call__(self, t_matmul: float, t_comm: float) -> float:
        return self.fixed_us + self.longer * max(t_matmul, t_comm) + self.shorter * min(t_matmul, t_comm)

    @classmethod
    def fit(cls, t_matmul: list[float], t_comm: list[float], times_us: list[float]):
        """To the times of as many problems, at least `MIN_POINTS`."""
        sides = np.sort(np.array([t_matmul, t_comm]), axis=0)
        measured = np.array(times_us)
        terms = np.stack([np.ones_like(measured), sides[1], sides[0]], axis=1) / measured[:, None]

        def fitted(chosen: np.ndarray) -> "Overlapped":
            # The longer side takes no less than alone, or long problems would be foretold a time below the ideal.
            bounds = ([0, 1, 0], np.inf)
            return cls(*scipy.optimize.lsq_linear(terms[chosen], np.ones(len(chosen)), bounds).x.tolist())

        whole = fitted(np.arange(len(measured)))
        error = spread(lambda others: lambda i: fitted(others)(*sides[:, i]), measured)
        return cls(whole.fixed_us, whole.longer, whole.shorter, float(sides.sum(axis=0).min()), error)


@dataclass(frozen=True)
class LinearCosts:
    """The part of a `Calibration` that `linear_all_reduce` is predicted from.

    dtypes: names of the types it holds for. all_reduce[backend]: µs by bytes of the result. overlapped: of every
    overlapping plan. unusable: str(plan) -> why it was left out.
    """

    dtypes: tuple[str, ...]
    matmul: MatmulTime
    all_reduce: dict[str, Curve]
    overlapped: dict[LinearPlan, Overlapped]
    unusable: dict[str, str]

    def comm_times(self, num_bytes: int) -> dict[str, float]:
        """µs of each backend; without those whose curve ends below `num_bytes` and below others': they take no more."""
        largest = max(curve.sizes[-1] for curve in self.all_reduce.values())
        return {
            name: curve(num_bytes)
            for name, curve in self.all_reduce.items()
            if num_bytes <= curve.sizes[-1] or curve.sizes[-1] == largest
        }

    def predict(self, m: int, n: int, k: int, t_matmul: float | None = None) -> dict[LinearPlan, float]:
        """µs of each plan for x (m, k) and weight (n, k); `t_matmul`: of the matmul, where it is known."""
        t_matmul = self.matmul(m, n, k) if t_matmul is None else t_matmul
        t_comm = self.comm_times(m * n * self.matmul.itemsize)
        predicted = {LinearPlan(backend=name): t_matmul + us for name, us in t_comm.items()}
        for plan, cost in self.overlapped.items():
            # A plan without a backend sums by itself: it is compared to the best of them.
            comm = t_comm.get(plan.backend) if plan.backend else min(t_comm.values())
            if comm is not None and t_matmul + comm >= cost.least_us:
                predicted[plan] = cost(t_matmul, comm)
        return predicted

    def choose(self, m: int, n: int, k: int, plans: Collection[LinearPlan], default: LinearPlan) -> LinearPlan:
        """The plan of `plans` to take unmeasured: an overlapping one only where its gain exceeds the model's errors.

        It has to beat the best sequential one even if it is slower than predicted by its `spread`, and the matmul is
        slower or faster by its own.
        """
        predicted = {plan: us for plan, us in self.predict(m, n, k).items() if plan in plans}
        sequential = [plan for plan in predicted if not plan.overlapped]
        best = min(sequential, key=lambda plan: (predicted[plan], str(plan)), default=default)
        if default in predicted and predicted[best] >= (1 - MARGIN) * predicted[default]:
            best = default
        candidates = [plan for plan in predicted if plan.overlapped]
        for factor in (math.exp(-self.matmul.spread), 1.0, math.exp(self.matmul.spread)):
            if best not in predicted:
                return best
            other = self.predict(m, n, k, factor * self.matmul(m, n, k))
            candidates = [
                plan
                for plan in candidates
                if plan in other and other[plan] * math.exp(self.overlapped[plan].spread) < (1 - MARGIN) * other[best]
            ]
        return min(candidates, key=lambda plan: (predicted[plan], str(plan)), default=best)

    def to_json(self) -> dict[str, Any]:
        """As plain lists and dicts."""
        return {
            "dtypes": list(self.dtypes),
            "matmul": asdict(self.matmul),
            "all_reduce": {name: asdict(curve) for name, curve in self.all_reduce.items()},
            "overlapped": [{"plan": asdict(plan), "cost": asdict(cost)} for plan, cost in self.overlapped.items()],
            "unusable": self.unusable,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "LinearCosts":
        """What `to_json` gave; KeyError or TypeError where it is of another form."""
        return cls(
            tuple(content["dtypes"]),
            MatmulTime(**content["matmul"]),
            {name: Curve(tuple(it["sizes"]), tuple(it["times_us"])) for name, it in content["all_reduce"].items()},
            {LinearPlan(**entry["plan"]): Overlapped(**entry["cost"]) for entry in content["overlapped"]},
            content["unusable"],
        )


def shortlist(
    predicted: Mapping[LinearPlan, float], plans: Iterable[LinearPlan], default: LinearPlan
) -> list[LinearPlan]:
    """Those of `plans` that are worth a measurement, the default first.

    Of each kind, sequential and overlapping, the best predicted within `SLACK` of the best sequential one, at most
    `MAX_OF_A_KIND`, but the best of every technique; where nothing is predicted, all.
    """
    plans = list(plans)
    known = {plan: predicted[plan] for plan in plans if plan in predicted}
    sequential = [us for plan, us in known.items() if not plan.overlapped]
    if not sequential:
        return list(dict.fromkeys([default, *plans]))
    limit = SLACK * min(sequential)
    near = sorted((plan for plan in known if known[plan] <= limit), key=lambda plan: (known[plan], str(plan)))
    chosen = [default]
    for overlapped in (False, True):
        of_kind = [plan for plan in near if plan.overlapped == overlapped]
        firsts = {plan.technique: plan for plan in reversed(of_kind)}.values()
        chosen += [*of_kind[:MAX_OF_A_KIND], *firsts]
    return list(dict.fromkeys(chosen))
