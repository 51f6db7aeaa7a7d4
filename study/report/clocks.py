"""Sections 1 and 5: the SM clock that a power limit leaves, and how much of what is missing to the ideal it is."""

import math
import pathlib
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from study.drawing.looks import look
from study.published.criteria import LINEAR_MANY_ROWS
from study.report import techniques
from study.report.linear import cells
from study.report.linear_limits import LIMITS_ROWS
from study.report.linear_persistent import TECHNIQUE
from study.report.report_tables import ABSENT, table
from study.results.evidence import Evidence, Missing
from study.sections.linear_all_reduce.methods import MATMUL

NOT_MEASURED, COMM_LIMITS = "not measured", "the all-reduce limits"


@dataclass(frozen=True)
class Clocked:
    """A method at one point: its time, the ideal's and that of the matmul alone in µs; mean SM clocks in MHz."""

    matmul_us: float
    ideal_us: float
    time_us: float
    matmul_mhz: float
    mhz: float

    @property
    def fraction(self) -> float:
        """Of the ideal, in time."""
        return self.ideal_us / self.time_us

    @property
    def relative(self) -> float:
        """Its clock over that of the matmul alone; NaN where one was not measured."""
        return self.mhz / self.matmul_mhz

    @property
    def at_equal_clock(self) -> float:
        """The fraction of the ideal in cycles; NaN where the matmul does not limit, or a clock was not measured."""
        return self.fraction / self.relative if self.matmul_us >= self.ideal_us else math.nan

    @property
    def cells(self) -> list[str]:
        """Fraction of the ideal, and the same at equal clock."""
        equal = f"**{self.at_equal_clock:.1%}**"
        if math.isnan(self.at_equal_clock):
            equal = NOT_MEASURED if math.isnan(self.relative) else COMM_LIMITS
        return [f"{self.fraction:.1%}", equal]


def of_linear(row: pd.Series) -> Clocked:
    clocks = (row.get(name, math.nan) for name in ("matmul_clock_mhz", "clock_mhz"))
    return Clocked(row["t_matmul_us"], row["ideal_us"], row["time_us"], *clocks)


def of_overlap(row: pd.Series) -> Clocked:
    clocks = (row.get(name, math.nan) for name in ("compute_clock_mhz", "clock_mhz"))
    return Clocked(row["t_comp_us"], row["ideal_us"], row["t_overlap_us"], *clocks)


def mhz(value: float) -> str:
    return NOT_MEASURED if math.isnan(value) else f"{value:.0f} MHz"


def body_row(name: str, sequential: Clocked | None, label: str, best: Clocked) -> list[str]:
    mine = mhz(best.mhz) + ("" if math.isnan(best.relative) else f", {best.relative - 1:+.1%}")
    before = ABSENT if sequential is None else mhz(sequential.mhz)
    return [name, mhz(best.matmul_mhz), before, f"{label}, {mine}", *best.cells]


def check_measured(found: Iterable[Clocked]) -> None:
    """Raises Missing where no point has both clocks: tables of earlier runs, and of CPUs."""
    if all(math.isnan(one.relative) for one in found):
        raise Missing("the SM clock was not measured")


def linear(machine: Evidence) -> str:
    """Section 5 at many rows: the clocks of the matmul alone, of sequential code and of the fastest of ours."""
    found = [cell for cell in cells(machine, MATMUL) if cell.ours is not None]
    sizes = {cell.m for cell in found}
    chosen = LIMITS_ROWS if LIMITS_ROWS in sizes else max(sizes, default=0)
    found = [cell for cell in found if cell.m == chosen]
    check_measured(of_linear(cell.ours) for cell in found)
    body = [
        body_row(cell.layer, None if cell.sequential is None else of_linear(cell.sequential),
                 look(cell.ours["method"]).label, of_linear(cell.ours))
        for cell in found
    ]  # fmt: skip
    return table(body, [f"layer, M = {chosen}", "clock: matmul alone", "sequential", "fastest of ours", "of the ideal",
                        "at equal clock"])  # fmt: skip


def overlap(machine: Evidence, root: pathlib.Path) -> str:
    """Section 1: the same of the published configurations, with the fastest technique."""
    groups = techniques.configurations(machine, root)
    best = {name: techniques.fastest(group) for name, group in groups.items()}
    check_measured(map(of_overlap, best.values()))
    body = []
    for name, group in groups.items():
        sequential = of_overlap(group.loc["sequential"]) if "sequential" in group.index else None
        body.append(body_row(name, sequential, look(best[name]["method"]).label, of_overlap(best[name])))
    return table(body, ["configuration", "clock: matmul alone", "sequential", "fastest technique", "of the ideal",
                        "at equal clock"])  # fmt: skip


def power(machine: Evidence, section: str) -> str:
    """A sentence of what the power limit is and what the GPUs drew while a section ran."""
    limit, clock = (machine.description.get(name) for name in ("power_limit_w", "max_sm_clock_mhz"))
    if not limit or not clock:
        return "The driver did not tell the limit."
    launches = machine.records[section].get("launches", {}).values()
    devices = [device for launch in launches for device in launch.get("sampled", {}).get("devices", [])]
    drawn = [device["power_w"]["max"] for device in devices if "power_w" in device]
    text = f"The limit is {limit:.0f} W a GPU, the highest clock of its SMs {clock:.0f} MHz"
    return text + (f"; up to {max(drawn):.0f} W were drawn while this section ran." if drawn else ".")


def told(machine: Evidence) -> list[str]:
    """The persistent kernel's clock at many rows where the matmul limits, and its part in what is missing there.

    Nothing where there is no such point or no clock was measured.
    """
    rows = [cell.rows.loc[TECHNIQUE] for cell in cells(machine, MATMUL)
            if cell.m >= LINEAR_MANY_ROWS and TECHNIQUE in cell.rows.index]  # fmt: skip
    found = [one for one in map(of_linear, rows) if not math.isnan(one.at_equal_clock)]
    if not found:
        return []
    clocks, equal, parts = ([getattr(one, name) for one in found]
                            for name in ("relative", "at_equal_clock", "fraction"))  # fmt: skip
    reached = statistics.median(parts)
    missing, by_clock = 1 - reached, statistics.median(equal) - reached
    share = f"the clock is {by_clock / missing:.0%}" if missing > 0 and by_clock > 0 else "the clock is nothing"
    return [f"where the matmul limits, M ≥ {LINEAR_MANY_ROWS}, {len(found)} points, the persistent kernel runs at "
            f"{middle(clocks)} of the clock of the matmul alone (median; {ends(clocks)}) and reaches {middle(parts)} "
            f"of the ideal; at equal clock it would be {middle(equal)}: {share} of what is missing there"]  # fmt: skip


def middle(values: list[float]) -> str:
    return f"{statistics.median(values):.1%}"


def ends(values: list[float]) -> str:
    """ "95% to 98%"."""
    return " to ".join(dict.fromkeys(f"{value:.0%}" for value in (min(values), max(values))))
