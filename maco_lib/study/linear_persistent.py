"""Section 5: what the persistent kernel waits for, by the model of its time, and what a faster matmul could change."""

import statistics
from dataclasses import dataclass

from maco_lib.experiments.linear_all_reduce_methods import MATMUL
from maco_lib.kernels.tile_order import CTAS
from maco_lib.overlap.linear_techniques.persistent_time import (
    PersistentTime,
    Tiling,
    fastest_tiling,
    persistent_time,
)
from maco_lib.study.criteria import LINEAR_MANY_ROWS, LINEAR_TARGETS
from maco_lib.study.evidence import Evidence, Missing
from maco_lib.study.linear import cells
from maco_lib.study.report_tables import table, us

TECHNIQUE = "persistent"
# Why a point falls short.
TRANSFERS, SUMS = "first wave and transfers", "sums of the last wave"
MATMUL_ITSELF, MODEL = "its matmul", "more than the model tells"


@dataclass(frozen=True)
class Point:
    """One layer and M: `model`, the kernel's time with tiles as `tiling`, beside what was measured, in µs.

    matmul_us: cuBLAS's, alone. wanted: the fraction of ideal to be reached, None where none is set.
    """

    layer: str
    m: int
    tiling: Tiling
    model: PersistentTime
    matmul_us: float
    ideal_us: float
    time_us: float
    wanted: float | None

    @property
    def error(self) -> float:
        return self.model.total / self.time_us - 1

    @property
    def fraction(self) -> float:
        return self.ideal_us / self.time_us

    @property
    def reach(self) -> float:
        """The fraction of ideal by the model, were all waves together as fast as cuBLAS's matmul."""
        model = self.model
        return self.ideal_us / (max(self.matmul_us + model.last_sums, model.first + model.fetched) + model.end)

    @property
    def cause(self) -> str:
        """What keeps it from `wanted`; empty where nothing does."""
        if self.wanted is None or self.fraction >= self.wanted:
            return ""
        if self.reach < self.wanted:
            model = self.model
            return TRANSFERS if model.first + model.fetched > self.matmul_us + model.last_sums else SUMS
        return MATMUL_ITSELF if self.ideal_us / self.model.total < self.wanted else MODEL


def points(machine: Evidence) -> list[Point]:
    """Every finished one of the technique from LINEAR_MANY_ROWS rows on; raises Missing where there is none."""
    found = []
    for cell in cells(machine, MATMUL):
        rows = cell.rows[cell.rows["technique"] == TECHNIQUE]
        if cell.m < LINEAR_MANY_ROWS or rows.empty:
            continue
        row = rows.iloc[0]
        ranks = int(row["tp"])
        shape, clusters = (cell.m, int(row["n"]), int(row["k"]) // ranks), int(row["num_sms"]) // CTAS
        tiling = fastest_tiling(*shape, ranks, clusters)
        model = persistent_time(*shape, tiling, ranks, clusters)
        found.append(Point(cell.layer, cell.m, tiling, model, row["t_matmul_us"], row["ideal_us"], row["time_us"],
                           LINEAR_TARGETS.get(ranks)))  # fmt: skip
    if not found:
        raise Missing(f"the persistent kernel finished no point of {LINEAR_MANY_ROWS} rows or more")
    return found


def modelled(machine: Evidence) -> str:
    """The parts of its time at every layer and many rows, what they add up to, and what they leave to reach."""
    body = [
        [one.layer, one.m, one.tiling, us(one.model.first), us(one.model.waves), us(one.model.last_sums),
         us(one.model.fetched), one.model.limit, f"{us(one.model.total)}, {us(one.time_us)}, {one.error:+.1%}",
         f"{one.fraction:.1%}", f"{one.reach:.1%}", one.cause]
        for one in points(machine)
    ]  # fmt: skip
    headers = ["layer", "M", "tile columns", "first wave", "all waves", "last wave's sums", "all transfers", "limit",
               "predicted, measured, error", "of the ideal", "with cuBLAS's matmul", "short by"]  # fmt: skip
    return table(body, headers)


def told(machine: Evidence) -> list[str]:
    """How far the model is off, and how many of the points that fall short a faster matmul would bring there."""
    found = points(machine)
    errors = [abs(one.error) for one in found]
    by_matmul = sum(one.model.limit == "matmul" for one in found)
    lines = [f"the model is off by {statistics.median(errors):.1%} in the median, {max(errors):.1%} at worst, over "
             f"{len(found)} points; by it the matmul limits {by_matmul} of them, the transfers "
             f"{len(found) - by_matmul}"]  # fmt: skip
    short = [one for one in found if one.cause]
    if not short:
        return lines
    counts = {cause: sum(one.cause == cause for one in short) for cause in (TRANSFERS, SUMS, MODEL)}
    parts = [f"by the model {counts[TRANSFERS] + counts[SUMS]} would still do so with a matmul as fast as cuBLAS's, "
             f"{counts[TRANSFERS]} by the {TRANSFERS}, {counts[SUMS]} by the {SUMS}"]  # fmt: skip
    gains = [one.reach - one.fraction for one in short if one.cause == MATMUL_ITSELF]
    if gains:
        least, most = f"{100 * min(gains):.1f}", f"{100 * max(gains):.1f}"
        parts.append(f"{len(gains)} by this kernel's own matmul: one as fast as cuBLAS's would add "
                     f"{least if least == most else f'{least} to {most}'} percentage points")  # fmt: skip
    if counts[MODEL]:
        parts.append(f"{counts[MODEL]} would not if they took the time that the model predicts")
    return [*lines, f"{len(short)} of {len(found)} points fall short of {short[0].wanted:.0%}: {'; '.join(parts)}"]
