"""Plans of `linear_all_reduce` that were measured elsewhere: a table per GPU model and number of ranks, in `tables/`.

A table holds points (M, N, K of a rank), of each the time of sequential NCCL and of the plans that beat it. What is
asked for takes the plans of the nearest point, by

    distance = 2 |log(M / M0)| + |log(N / N0)| + |log(K / K0)|

M counts twice, as it decides which technique there is: by the stored tables a plan found at another M is worse than one
found at another layer. A plan is taken where its gain over sequential NCCL at that point is sure to be one here:

    gain · fill(M) / fill(M0) > 1 + margin + decay · distance

fill: the part of the tiles' rows that are x's, of techniques whose kernels compute whole tiles. Else the default is
taken, as `FAR` from all points and where there is no table. Without torch.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from maco_lib.kernels.tile_order import ROWS
from maco_lib.overlap.linear_plan import LinearPlan
from maco_lib.overlap.plan import MARGIN

FOLDER = pathlib.Path(__file__).parent / "tables"
# A factor of 20 in all.
FAR = 3.0
# A gain is less by so much at a distance of 1: by the stored tables, each layer judged by the others', at most 0.2, of
# gains that were far above it.
DECAY = 0.1
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Point:
    """A measured shape (m, n, k of a rank): µs of sequential NCCL, and of each plan that beats it."""

    shape: Shape
    default_us: float
    times_us: Mapping[LinearPlan, float]


@dataclass(frozen=True)
class Found:
    """What a table says of a shape: the plan, None for the default; the point that says so, and its distance."""

    plan: LinearPlan | None
    point: Point
    distance: float


@dataclass(frozen=True)
class PlanTable:
    """The points of one GPU model and number of ranks."""

    name: str
    points: tuple[Point, ...]

    def look_up(self, m: int, n: int, k: int, usable: Callable[[LinearPlan], bool]) -> Found:
        """The fastest `usable` plan of the nearest point, if it is sure to gain."""
        shape = (m, n, k)
        point = min(self.points, key=lambda point: distance(shape, point.shape))
        far = distance(shape, point.shape)
        expected_us = {
            plan: us * fill(plan, point.shape[0]) / fill(plan, m) for plan, us in point.times_us.items() if usable(plan)
        }
        best = min(expected_us, key=lambda plan: (expected_us[plan], plan.name), default=None)
        sure = far <= FAR and best and point.default_us / expected_us[best] > 1 + MARGIN + DECAY * far
        return Found(best if sure else None, point, far)

    @classmethod
    def from_json(cls, content: dict) -> "PlanTable":
        return cls(
            f"{content['gpu']}-x{content['num_ranks']}",
            tuple(
                Point(
                    (entry["m"], entry["n"], entry["k"]),
                    entry["nccl_us"],
                    {LinearPlan.parse(name): us for name, us in entry["plans"].items()},
                )
                for entry in content["points"]
            ),
        )


def distance(one: Shape, other: Shape) -> float:
    return sum(weight * abs(math.log(a / b)) for weight, a, b in zip((2, 1, 1), one, other, strict=True))


def fill(plan: LinearPlan, m: int) -> float:
    """The part of the rows that the plan's kernel computes which are x's."""
    return m / (-(-m // ROWS) * ROWS) if plan.technique == "persistent" else 1.0


@functools.cache
def shipped(gpu: str, num_ranks: int) -> PlanTable | None:
    """The table for so many GPUs of that model, as `machine.short_gpu_name` calls it ("h200"), if there is one."""
    path = FOLDER / f"{gpu}-x{num_ranks}.json"
    return PlanTable.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
