"""Section 5's tables: every layer and number of rows by every method, the planner's choices, and what failed."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from maco_lib.kernels.decode_tiles import MAX_ROWS
from maco_lib.linear.techniques.persistent_time import ITEMSIZE
from study.drawing.looks import label_at, look
from study.drawing.style import digits
from study.harness.markdown import verbatim
from study.published.criteria import LINEAR_TOLERANCE
from study.report.report_tables import ABSENT, interval, table, us
from study.results.evidence import Evidence, Missing
from study.sections.linear_all_reduce.methods import BASE, CHAIN, LAYERS, MATMUL

PLANNER, UNTUNED = "auto", "auto_untuned"


@dataclass(frozen=True)
class Cell:
    """One layer at one M, one operation: its finished rows by method. `ours`: without peers and planner."""

    layer: str
    m: int
    rows: pd.DataFrame

    @property
    def name(self) -> str:
        return f"{self.layer}, M = {self.m}"

    @functools.cached_property
    def base(self) -> pd.Series | None:
        return next((row for _, row in self.rows.iterrows() if row["method"] in BASE.values()), None)

    @functools.cached_property
    def planner(self) -> pd.Series | None:
        return self.rows.loc[PLANNER] if PLANNER in self.rows.index else None

    @functools.cached_property
    def peer(self) -> pd.Series | None:
        return fastest(self.rows[self.rows["is_peer"]])

    @functools.cached_property
    def ours(self) -> pd.Series | None:
        return fastest(self.rows[~self.rows["is_peer"] & ~self.rows["method"].isin([PLANNER, UNTUNED])])

    @functools.cached_property
    def best(self) -> pd.Series | None:
        """What is ours or what the planner chose, whichever is faster."""
        return fastest(self.rows[~self.rows["is_peer"]])

    @functools.cached_property
    def sequential(self) -> pd.Series | None:
        return fastest(self.rows[self.rows["method"].str.startswith("sequential_")])


def fastest(rows: pd.DataFrame) -> pd.Series | None:
    return None if rows.empty else rows.loc[rows["time_us"].idxmin()]


# A report asks for them some eighty times, and making them is most of its work.
@functools.lru_cache(maxsize=32)
def cells(machine: Evidence, operation: str) -> list[Cell]:
    """Every layer and M with a finished row, in order; raises Missing when there is none."""
    rows = machine.table("linear_all_reduce")
    rows = rows[(rows["operation"] == operation) & rows["time_us"].notna()]
    if rows.empty:
        raise Missing(f"no method of {operation} was finished")
    return [
        Cell(layer, int(m), rows[(rows["layer"] == layer) & (rows["m"] == m)].set_index("method", drop=False))
        for layer in LAYERS
        for m in sorted(rows.loc[rows["layer"] == layer, "m"].unique())
    ]


def absent_peers(machine: Evidence, operation: str) -> list[str]:
    """The peers of an operation that were to be measured and finished no point of it, by their labels."""
    rows = machine.table("linear_all_reduce")
    rows = rows[(rows["operation"] == operation) & rows["is_peer"]]
    return [look(name).label for name, of in rows.groupby("method", sort=False) if not of["correct"].any()]


def timed(row: pd.Series | None, name: bool = True) -> str:
    """ "persistent kernel, 62.1 [61, 63.2] µs"."""
    if row is None:
        return ABSENT
    shown = interval(row, "time", "us", us)
    return f"{label_at(row['method'], summed_bytes(row))}, {shown}" if name else shown


def summed_bytes(row: pd.Series) -> int:
    """Of the product, which is all-reduced."""
    return int(row["m"] * row["n"] * ITEMSIZE)


def over(before: pd.Series | None, after: pd.Series | None) -> str:
    return ABSENT if before is None or after is None else f"**{before['time_us'] / after['time_us']:.2f}×**"


def part(row: pd.Series | None) -> str:
    return ABSENT if row is None else f"{row['fraction_of_ideal']:.1%}"


def shapes(machine: Evidence) -> str:
    """The layers' weights: "Qwen3-8B o_proj 4096 × 4096, ..."."""
    rows = machine.table("linear_all_reduce").drop_duplicates(["layer", "n", "k", "tp"])
    each = ", ".join(f"{row.layer} {row.n} × {row.k}" for row in rows.itertuples())
    return f"Weights, N × K before K is divided among {'/'.join(map(str, sorted(rows['tp'].unique())))} ranks: {each}."


def comparison(machine: Evidence) -> str:
    """Matmul + all-reduce: per layer and M the ideal, sequential code, the fastest peer, the fastest of ours, auto."""
    body = []
    for cell in cells(machine, MATMUL):
        any_row = cell.rows.iloc[0]
        backend = any_row["t_comm_backend"]
        backend = label_at(backend, summed_bytes(any_row)) if backend else ABSENT
        planner = cell.planner
        plan = f"`{planner['plan']}`, " if planner is not None and planner["plan"] else ""
        body.append([
            cell.layer, cell.m, f"{us(any_row['t_matmul_us'])}, {us(any_row['t_comm_us'])} ({backend})",
            timed(cell.base, name=False), timed(cell.peer), timed(cell.ours), part(cell.ours),
            over(cell.base, cell.ours), f"{plan}{timed(planner, name=False)}", part(planner),
        ])  # fmt: skip
    headers = ["layer", "M", "alone: matmul, best all-reduce", "sequential", "fastest peer", "fastest of ours",
               "of the ideal", "over sequential", "planner", "of the ideal"]  # fmt: skip
    return table(body, headers)


def chain(machine: Evidence) -> str:
    """With residual and RMSNorm, at few rows: sequential code, the fastest peer, ours."""
    body = []
    for cell in cells(machine, CHAIN):
        body.append([
            cell.layer, cell.m, us(cell.rows["t_matmul_us"].iloc[0]), timed(cell.base, name=False), timed(cell.peer),
            timed(cell.ours), timed(cell.planner, name=False), over(cell.base, cell.best),
            over(cell.peer, cell.best),
        ])  # fmt: skip
    return table(body, ["layer", "M", "matmul alone", "sequential", "fastest peer", "ours", "planner",
                        "over sequential", "over the fastest peer"])  # fmt: skip


def weight_rates(machine: Evidence) -> str:
    """How fast the chain passes over its weight, where reading that is the longest part; beside it the matmul alone."""
    found = [cell for cell in cells(machine, CHAIN) if cell.m <= MAX_ROWS and cell.best is not None]
    if not found:
        raise Missing(f"the chain finished no point of {MAX_ROWS} rows or fewer")

    def rates(times_us: Iterable[float]) -> str:
        sizes = (row["n"] * row["k"] / row["tp"] * ITEMSIZE for row in (cell.rows.iloc[0] for cell in found))
        values = [size / us / 1e3 for size, us in zip(sizes, times_us, strict=True)]
        return f"{digits(min(values))} to {digits(max(values))} GB/s"

    ours = rates(cell.best["time_us"] for cell in found)
    alone = rates(cell.rows["t_matmul_us"].iloc[0] for cell in found)
    text = f"up to {MAX_ROWS} rows the whole chain passes over its weight at {ours}, torch's matmul alone at {alone}"
    try:
        copies = machine.table("environment").query("quantity == 'memory_copy'")["value"].dropna()
    except Missing:
        return text
    return text if copies.empty else f"{text}; a copy within the memory moves {digits(copies.max())} GB/s"


def planner(machine: Evidence) -> list[str]:
    """What the planner chose, how far its predictions were off, and what it loses where it was not tuned."""
    found = cells(machine, MATMUL)
    rows = [cell.planner for cell in found if cell.planner is not None]
    if not rows:
        raise Missing(f"the planner was not measured on {machine.name}")
    counts = pd.Series([row["plan"] for row in rows]).value_counts(sort=False)
    counts = counts.sort_values(ascending=False, kind="stable")
    lines = [f"tuned, it chose {', '.join(f'`{plan}` {count}×' for plan, count in counts.items())}"]
    errors = pd.Series([row.get("predicted_us", math.nan) / row["time_us"] - 1 for row in rows]).dropna().abs()
    if len(errors):
        lines.append(f"the time that its model predicts for that plan is off by {errors.median():.1%} in the median, "
                     f"{errors.max():.1%} at worst, over {len(errors)} points")  # fmt: skip
    # The planner's models are no more: only tables of before have what they predicted.
    losses = {cell.name: cell.rows.loc[UNTUNED, "time_us"] / cell.planner["time_us"] - 1 for cell in found
              if UNTUNED in cell.rows.index and cell.planner is not None}  # fmt: skip
    if losses:
        worst = max(losses, key=losses.get)
        near = sum(loss <= LINEAR_TOLERANCE for loss in losses.values())
        source = "model" if "predicted_us" in machine.table("linear_all_reduce") else "shipped table"
        lines.append(f"untuned, by the {source} alone, it is within {LINEAR_TOLERANCE:.0%} of that in {near} of "
                     f"{len(losses)} points; at worst {losses[worst]:+.1%}, {worst}")  # fmt: skip
    return lines


def failures(machine: Evidence) -> list[str]:
    """A line for each method that failed somewhere: where, and why."""
    rows = machine.table("linear_all_reduce")
    rows = rows[~rows["correct"]]
    lines = []
    for (operation, method), group in rows.groupby(["operation", "method"], sort=False):
        of = len(machine.table("linear_all_reduce").query("operation == @operation and method == @method"))
        reasons = verbatim("; ".join(dict.fromkeys(group["error"])))
        lines.append(f"{look(method).label} ({operation}): failed at {len(group)} of {of} points: {reasons}")
    return lines
