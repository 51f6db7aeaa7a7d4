"""Section 5: what the persistent kernel waits for, by the model of its time, and what a faster matmul could change."""

import statistics
from dataclasses import dataclass, replace

import pandas as pd

from maco_lib.kernels.tile_order import CTAS
from maco_lib.linear.techniques.persistent_time import PersistentTime, parse_tiling, persistent_time
from study.published.criteria import LINEAR_MANY_ROWS, LINEAR_TARGETS
from study.report.linear import Cell, cells
from study.report.report_tables import table, us
from study.results.evidence import Evidence, Missing
from study.sections.linear_all_reduce.methods import MATMUL

TECHNIQUE = "persistent"
# The machines to runs of which the model's constants of tiles and fetches were fitted, and which of these runs a table
# may hold; and to whose tables, as of which commit, those of what comes once.
FITTED_TO, FITTED_TABLE = ("h200-x2", "h200-x4"), "those of h200-x2's table as of commit 23942ff among them"
ONCE_FITTED_TO, ONCE_FITTED_AT = ("h100-x2", "h100-x4", "h200-x2"), "15a4958"
# Why a point falls short.
TRANSFERS, SUMS = "first wave and transfers", "sums of the last wave"
MATMUL_ITSELF, MODEL, UNDECIDED = "its matmul", "more than the model tells", "undecided"


@dataclass(frozen=True)
class Point:
    """One layer and M: `model`, the kernel's time with tiles of that name, `tiling`, beside what was measured, in µs.

    matmul_us: cuBLAS's, alone. wanted: the fraction of ideal to be reached, None where none is set.
    """

    layer: str
    m: int
    tiling: str
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
    def with_cublas(self) -> PersistentTime:
        """As modelled if all waves together took as long as cuBLAS's matmul."""
        return replace(self.model, waves=self.matmul_us)

    @property
    def with_cublas_us(self) -> tuple[float, float]:
        """(least, most) of its time then, from what was measured.

        Where the model's error lies is not known: once as modelled, once the measured time less what the model says
        that it gains; never less than the ideal.
        """
        modelled = self.with_cublas.total
        gained = max(self.time_us - (self.model.total - modelled), self.ideal_us)
        return min(modelled, gained), max(modelled, gained)

    @property
    def reach(self) -> tuple[float, float]:
        """(least, most) fraction of ideal with a matmul as fast as cuBLAS's."""
        least, most = self.with_cublas_us
        return self.ideal_us / most, self.ideal_us / least

    @property
    def cause(self) -> str:
        """What keeps it from `wanted`; empty where nothing does, UNDECIDED where that hangs on the model's error."""
        if self.wanted is None or self.fraction >= self.wanted:
            return ""
        least, most = self.reach
        if most < self.wanted:
            return TRANSFERS if self.with_cublas.limit == "transfers" else SUMS
        if self.ideal_us / self.model.total >= self.wanted:
            return MODEL
        return MATMUL_ITSELF if least >= self.wanted else UNDECIDED


def spread(ends: tuple[float, float]) -> str:
    """ "87.1% to 95.4%"."""
    return " to ".join(dict.fromkeys(f"{value:.1%}" for value in ends))


def finished(machine: Evidence) -> list[tuple[Cell, pd.Series]]:
    """The technique's row of every cell of LINEAR_MANY_ROWS rows or more that has one."""
    found = []
    for cell in cells(machine, MATMUL):
        rows = cell.rows[cell.rows["technique"] == TECHNIQUE]
        if cell.m >= LINEAR_MANY_ROWS and len(rows):
            found.append((cell, rows.iloc[0]))
    return found


def points(machine: Evidence) -> list[Point]:
    """Those that say which tiles they took, if the model has constants for them; raises Missing where there is none."""
    found = []
    for cell, row in finished(machine):
        tiling = parse_tiling(row["tiling"])
        if tiling is not None:
            ranks = int(row["tp"])
            shape, clusters = (cell.m, int(row["n"]), int(row["k"]) // ranks), int(row["num_sms"]) // CTAS
            model = persistent_time(*shape, tiling, ranks, clusters)
            times = (row[f"{name}_us"] for name in ("t_matmul", "ideal", "time"))
            found.append(Point(cell.layer, cell.m, row["tiling"], model, *times, LINEAR_TARGETS.get(ranks)))
    if not found:
        raise Missing(f"no point of the persistent kernel, {LINEAR_MANY_ROWS} rows or more, tells the tiles it took")
    return found


def modelled(machine: Evidence) -> str:
    """The parts of its time at every layer and many rows, what they add up to, and what they leave to reach."""
    body = [
        [one.layer, one.m, one.tiling, us(one.model.first), us(one.model.waves), us(one.model.last_sums),
         us(one.model.fetched), one.model.limit, f"{us(one.model.total)}, {us(one.time_us)}, {one.error:+.1%}",
         f"{one.fraction:.1%}", spread(one.reach), one.cause]
        for one in points(machine)
    ]  # fmt: skip
    headers = ["layer", "M", "tile columns", "first wave", "all waves", "last wave's sums", "all transfers", "limit",
               "predicted, measured, error", "of the ideal", "with cuBLAS's matmul", "short by"]  # fmt: skip
    return table(body, headers)


def told(machine: Evidence) -> list[str]:
    """How far the model is off, and what keeps points short."""
    found = points(machine)
    errors = [abs(one.error) for one in found]
    by_matmul = sum(one.model.limit == "matmul" for one in found)
    return [f"the model is off by {statistics.median(errors):.1%} in the median, {max(errors):.1%} at worst, over "
            f"{len(found)} points; by it the matmul limits {by_matmul} of them, the transfers {len(found) - by_matmul}",
            *shortfalls(machine)]  # fmt: skip


def shortfalls(machine: Evidence) -> list[str]:
    """A line on the points that fall short: how many a faster matmul would bring there; none where no run tells."""
    try:
        found = points(machine)
    except Missing:
        return []
    short = [one for one in found if one.cause]
    if not short:
        return []
    counts = {cause: sum(one.cause == cause for one in short) for cause in (TRANSFERS, SUMS, MODEL, UNDECIDED)}
    parts = [f"{counts[cause]} by the {cause}, whatever the matmul" for cause in (TRANSFERS, SUMS) if counts[cause]]
    gains = [end - one.fraction for one in short if one.cause == MATMUL_ITSELF for end in one.reach]
    if gains:
        ends = dict.fromkeys(f"{100 * value:.1f}" for value in (min(gains), max(gains)))
        number = sum(one.cause == MATMUL_ITSELF for one in short)
        parts.append(f"{number} by this kernel's own matmul: one as fast as cuBLAS's would add {' to '.join(ends)} "
                     "percentage points")  # fmt: skip
    if counts[UNDECIDED]:
        parts.append(f"{counts[UNDECIDED]} undecided: by where the model's error there lies, it is the matmul or what "
                     "comes beside it")  # fmt: skip
    if counts[MODEL]:
        parts.append(f"{counts[MODEL]} would not if they took the time that the model predicts")
    return [f"{len(short)} of {len(found)} points fall short of {short[0].wanted:.0%}: {'; '.join(parts)}"]


def constants(machine: Evidence) -> str:
    """Where the model's constants come from, seen from this machine."""
    fitted = f"They were fitted to runs on {' and '.join(FITTED_TO)}, {FITTED_TABLE}"
    rest = (
        "What it takes to begin and to end, and a partial's way to its owner, were fitted to the tables of "
        f"{', '.join(ONCE_FITTED_TO)} as of commit {ONCE_FITTED_AT}."
    )
    if machine.hardware in FITTED_TO:
        return f"{fitted}. {rest}"
    return f"{fitted}: the model's error here is also what the machines differ by. {rest}"
