"""What a machine's calibration says of `linear_all_reduce`: how long each plan takes for (M, N, K), and which to take.

    T_matmul     = of `linear_matmul`
    T_comm       = a curve through measured sizes, of each backend: from the product to the result, what a sum costs
    sequential   = T_matmul + T_comm
    overlapping  = fixed + a·max(T_matmul, T_comm) + b·min(T_matmul, T_comm)
    by itself    = `PersistentTime` or `DecodeTime`, for techniques that sum without a backend, with factors for what
                   differs by machine; or as overlapping, whichever foretells better what it has not seen

a: how much slower than alone the longer side is (a kernel that multiplies worse than cuBLAS, SMs taken from the
matmul); b: the part of the shorter side that is not hidden (1/C of C chunks, at best); fixed: launches, waits, the last
tile's way. Fitted for each overlapping plan by least squares of relative errors, and kept with the error of what
decides: of the predicted gain over the sequential plan, at problems that the fit has not seen. Without torch.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import scipy.optimize

from maco_lib.kernels.tile_order import CTAS
from maco_lib.overlap.costs import Curve
from maco_lib.overlap.left_out import spread, without
from maco_lib.overlap.linear_matmul import MatmulTime
from maco_lib.overlap.linear_plan import LinearPlan
from maco_lib.overlap.linear_techniques.decode_time import DecodeTime, decode_time
from maco_lib.overlap.linear_techniques.persistent_time import PersistentTime, parse_tiling, persistent_time
from maco_lib.overlap.plan import MARGIN

MIN_POINTS = 4
# What `tune_linear` measures: sequential plans predicted within SLACK of the best of them, at most so many, and as many
# overlapping ones that are predicted within SLACK of that.
SLACK = 1.3
MAX_OF_A_KIND = 8


@dataclass(frozen=True)
class Sides:
    """Of a problem, in µs: T_matmul and T_comm, each alone; own: by the technique's own formula, where it has one."""

    t_matmul: float
    t_comm: float
    own: PersistentTime | DecodeTime | None = None

    @property
    def sequential(self) -> float:
        return self.t_matmul + self.t_comm


@dataclass(frozen=True)
class Overlapped:
    """The formula's constants for one plan: fixed_us, longer (a) and shorter (b), or scales for the technique's own.

    least_us: the shortest T_matmul + T_comm that it was fitted to, below which it predicts nothing. spread: 90 %
    quantile of |log(predicted / measured)| of its time over the sequential one's, each predicted without the problem.
    """

    fixed_us: float = 0.0
    longer: float = 0.0
    shorter: float = 0.0
    scales: tuple[float, ...] = ()
    least_us: float = 0.0
    spread: float = 0.0

    def __call__(self, sides: Sides) -> float:
        if self.scales:
            return sides.own.scaled_us(self.scales)
        shorter, longer = sorted((sides.t_matmul, sides.t_comm))
        return self.fixed_us + self.longer * longer + self.shorter * shorter

    @classmethod
    def fit(cls, problems: list[Sides], times_us: list[float], unseen: list[float]):
        """To the times of as many problems, at least `MIN_POINTS`: of its two forms the one with the lesser spread.

        unseen: T_matmul of each, as predicted from the others'.
        """
        forms = [cls.of_sides, cls.of_own] if problems[0].own else [cls.of_sides]
        fits = [cls.tried(form, problems, times_us, unseen) for form in forms]
        return min(fits, key=lambda fit: fit.spread)

    @classmethod
    def tried(cls, form: Callable, problems: list[Sides], times_us: list[float], unseen: list[float]):
        """Of one form, with its spread."""
        gains, measured = [], []
        for i, (problem, t_matmul) in enumerate(zip(problems, unseen, strict=True)):
            fit, foreseen = form(*without(i, problems, times_us)), replace(problem, t_matmul=t_matmul)
            gains.append(fit(foreseen) / foreseen.sequential)
            measured.append(times_us[i] / problem.sequential)
        least = min(problem.sequential for problem in problems)
        return replace(form(problems, times_us), least_us=least, spread=spread(gains, measured))

    @classmethod
    def of_own(cls, problems: list[Sides], times_us: list[float]):
        def errors(scales: np.ndarray) -> list[float]:
            return [problem.own.scaled_us(scales) / us - 1 for problem, us in zip(problems, times_us, strict=True)]

        start, exactly = np.ones(problems[0].own.num_scales), {"ftol": 1e-14, "xtol": 1e-14, "gtol": 1e-14}
        found = scipy.optimize.least_squares(errors, start, bounds=(0, np.inf), **exactly)
        return cls(scales=tuple(found.x.tolist()))

    @classmethod
    def of_sides(cls, problems: list[Sides], times_us: list[float]):
        measured = np.array(times_us)
        sides = np.array([sorted((problem.t_matmul, problem.t_comm)) for problem in problems]).T
        terms = np.stack([np.ones_like(measured), sides[1], sides[0]], axis=1) / measured[:, None]
        # The longer side takes no less than alone, or long problems would be foretold a time below the ideal.
        bounds = ([0, 1, 0], np.inf)
        return cls(*scipy.optimize.lsq_linear(terms, np.ones(len(measured)), bounds).x.tolist())


@dataclass(frozen=True)
class LinearCosts:
    """The part of a `Calibration` that `linear_all_reduce` is predicted from.

    num_ranks: of the group. dtypes: names of the types it holds for. all_reduce[backend]: µs by bytes of the result.
    overlapped: of every overlapping plan. unusable: str(plan) -> why it was left out.
    """

    num_ranks: int
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

    def sides(self, plan: LinearPlan, m: int, n: int, k: int, t_matmul: float, t_comm: float) -> Sides:
        """As the costs of the plan see it: of the persistent kernel each tiling by itself, as which is the fastest
        differs by machine."""
        clusters, own = self.matmul.num_sms // CTAS, None
        if plan.technique == "persistent":
            tiling, rate = parse_tiling(plan.tiling), self.matmul.bytes_per_us
            own = persistent_time(m, n, k, tiling, self.num_ranks, clusters, rate)
        elif plan.technique == "decode":
            own = decode_time(m, n, k, self.num_ranks)
        return Sides(t_matmul, t_comm, own)

    def predict(self, m: int, n: int, k: int) -> dict[LinearPlan, float]:
        """µs of each plan for x (m, k) and weight (n, k)."""
        t_matmul = self.matmul(m, n, k)
        t_comm = self.comm_times(m * n * self.matmul.itemsize)
        predicted = {LinearPlan(backend=name): t_matmul + us for name, us in t_comm.items()}
        for plan, cost in self.overlapped.items():
            # A plan without a backend sums by itself: it is compared to the best of them.
            comm = t_comm.get(plan.backend) if plan.backend else min(t_comm.values())
            if comm is not None and t_matmul + comm >= cost.least_us:
                predicted[plan] = cost(self.sides(plan, m, n, k, t_matmul, comm))
        return predicted

    def choose(self, m: int, n: int, k: int, plans: Collection[LinearPlan], default: LinearPlan) -> LinearPlan:
        """The plan of `plans` to take unmeasured: an overlapping one only where its gain exceeds the error of gains.

        It has to beat the best sequential one even if the two are apart by its `spread` less than predicted.
        """
        predicted = {plan: us for plan, us in self.predict(m, n, k).items() if plan in plans}
        sequential = [plan for plan in predicted if not plan.overlapped]
        best = min(sequential, key=lambda plan: (predicted[plan], str(plan)), default=default)
        if default in predicted and predicted[best] >= (1 - MARGIN) * predicted[default]:
            best = default
        if best not in predicted:
            return best
        limit = (1 - MARGIN) * predicted[best]
        candidates = [
            plan
            for plan in predicted
            if plan.overlapped and predicted[plan] * math.exp(self.overlapped[plan].spread) < limit
        ]
        return min(candidates, key=lambda plan: (predicted[plan], str(plan)), default=best)

    def to_json(self) -> dict[str, Any]:
        """As plain lists and dicts."""
        return {
            "num_ranks": self.num_ranks,
            "dtypes": list(self.dtypes),
            "matmul": asdict(self.matmul),
            "all_reduce": {name: asdict(curve) for name, curve in self.all_reduce.items()},
            "overlapped": [{"plan": plan.name, "cost": asdict(cost)} for plan, cost in self.overlapped.items()],
            "unusable": self.unusable,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "LinearCosts":
        """What `to_json` gave; KeyError or TypeError where it is of another form."""
        return cls(
            content["num_ranks"],
            tuple(content["dtypes"]),
            MatmulTime(**content["matmul"]),
            {name: Curve(tuple(it["sizes"]), tuple(it["times_us"])) for name, it in content["all_reduce"].items()},
            {
                LinearPlan.parse(entry["plan"]): Overlapped(
                    **{**entry["cost"], "scales": tuple(entry["cost"]["scales"])}
                )
                for entry in content["overlapped"]
            },
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
