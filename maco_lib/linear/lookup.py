"""Times of `linear_all_reduce` by each plan, measured elsewhere: a table per GPU model and number of ranks (`tables/`).

A table holds layers (N, K of a rank), and of each the times of plans at some M. A shape (M, N, K) is looked up in the
nearest layer, by the distance |log(N / N0)| + |log(K / K0)|. There the time of each plan follows from its measured
ones: between two M by a straight line in logarithms of both, below all as at the least, above all in proportion. A
kernel that computes whole tiles of rows takes as long as for whole tiles. The fastest plan is taken if it is faster
than the default (sequential NCCL) by more than `NOISE`; else the default, as further than `FAR` from every layer.

"persistent" is without a tiling: the kernel takes that which is predicted to be the fastest for the shape itself, which
was nearer to the best on other layers than the tiling of the nearest measured shape. Without torch.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

from maco_lib.kernels.decode_tiles import padded_rows
from maco_lib.kernels.tile_order import ROWS
from maco_lib.linear.plan import LinearPlan

FOLDER = pathlib.Path(__file__).parent / "tables"
# Of a gain: stored times of one launch are up to 2 % off those of another, and so are layers from each other.
NOISE = 0.03
# A factor of 20 in N and K together.
FAR = 3.0
# A plan is looked up for at most so many times more or fewer rows than it was measured with.
BEYOND = 2


@dataclass(frozen=True)
class Times:
    """One plan's in µs by M, on one layer."""

    plan: LinearPlan
    by_rows: dict[int, float]

    def covers(self, m: int) -> bool:
        return min(self.by_rows) / BEYOND <= m <= max(self.by_rows) * BEYOND

    def __call__(self, m: int) -> float:
        """For m rows."""
        m, times_us = computed(self.plan, m), {computed(self.plan, rows): us for rows, us in self.by_rows.items()}
        least, most = min(times_us), max(times_us)
        if m >= most:
            return times_us[most] * m / most
        below = max((rows for rows in times_us if rows <= m), default=least)
        above = min(rows for rows in times_us if rows >= m)
        if below == above or m < least:
            return times_us[above]
        part = math.log(m / below) / math.log(above / below)
        return times_us[below] ** (1 - part) * times_us[above] ** part


def computed(plan: LinearPlan, m: int) -> int:
    """The rows that the plan's kernel computes for m of x."""
    if plan.technique == "persistent":
        return -(-m // ROWS) * ROWS
    return padded_rows(m) if plan.technique == "decode" else m


@dataclass(frozen=True)
class LayerTimes:
    """A measured layer: weights (n, k) on each rank, and the times of plans, the default's among them."""

    n: int
    k: int
    default: Times
    plans: tuple[Times, ...]

    def distance(self, n: int, k: int) -> float:
        return abs(math.log(n / self.n)) + abs(math.log(k / self.k))


@dataclass(frozen=True)
class Found:
    """What a table says of a shape. plan: None for the default; gain: of it over the default, at `layer`."""

    plan: LinearPlan | None
    gain: float
    layer: LayerTimes
    distance: float


@dataclass(frozen=True)
class PlanTable:
    """The layers of one GPU model and number of ranks. name: "h200-x2"."""

    name: str
    layers: tuple[LayerTimes, ...]

    def look_up(self, m: int, n: int, k: int, usable: Callable[[LinearPlan], bool]) -> Found:
        """The plan for x (m, k) and weight (n, k) on each rank, of those that are `usable`."""
        layer = min(self.layers, key=lambda layer: layer.distance(n, k))
        distance, default_us = layer.distance(n, k), layer.default(m)
        gains = {times.plan: default_us / times(m) for times in layer.plans if times.covers(m) and usable(times.plan)}
        best = max(gains, key=lambda plan: (gains[plan], plan.name), default=None)
        if best is None or distance > FAR or gains[best] <= 1 + NOISE:
            return Found(None, 1.0, layer, distance)
        return Found(best, gains[best], layer, distance)

    @classmethod
    def from_json(cls, content: dict) -> "PlanTable":
        """What `study.export_plans` writes; KeyError or ValueError where it is of another form."""
        layers = []
        for entry in content["layers"]:
            plans = {
                name: Times(LinearPlan.parse(name), {int(m): us for m, us in times.items()})
                for name, times in entry["times_us"].items()
            }
            default = plans.pop(content["default"])
            layers.append(LayerTimes(entry["n"], entry["k"], default, tuple(plans.values())))
        return cls(f"{content['gpu']}-x{content['num_ranks']}", tuple(layers))


@functools.cache
def shipped(gpu: str, num_ranks: int) -> PlanTable | None:
    """The table for so many GPUs of that model, as `host.short_gpu_name` calls it ("h200"), if there is one."""
    path = FOLDER / f"{gpu}-x{num_ranks}.json"
    return PlanTable.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
