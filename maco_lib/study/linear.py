"""Section 5's tables: every layer and number of rows, what it is meant to reach, and what limits each technique."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd

from maco_lib.experiments.linear_all_reduce_methods import BASE, CHAIN, LAYERS, MATMUL
from maco_lib.study.criteria import (
    LINEAR_CHAIN_SPEEDUP,
    LINEAR_ERROR,
    LINEAR_FEW_ROWS,
    LINEAR_GROWTH_BYTES,
    LINEAR_MANY_ROWS,
    LINEAR_TARGETS,
    LINEAR_TOLERANCE,
    TARGET_LAUNCHES,
)
from maco_lib.study.evidence import Evidence, Missing
from maco_lib.study.figures.style import look, size_label
from maco_lib.study.report_tables import ABSENT, interval, table, us

PLANNER, UNTUNED = "auto", "auto_untuned"
# Of cuBLAS's matmuls at many rows on Hopper GPUs: what the waves of a matmul are counted in.
TILE = (128, 256)
LIMITS_ROWS = 4096
MOST_EXCEPTIONS = 12


@dataclass(frozen=True)
class Cell:
    """One layer at one M, one operation: its finished rows by method. `ours`: without peers and planner."""

    layer: str
    m: int
    rows: pd.DataFrame

    @property
    def name(self) -> str:
        return f"{self.layer}, M = {self.m}"

    @property
    def base(self) -> pd.Series | None:
        return next((row for _, row in self.rows.iterrows() if row["method"] in BASE.values()), None)

    @property
    def planner(self) -> pd.Series | None:
        return self.rows.loc[PLANNER] if PLANNER in self.rows.index else None

    @property
    def peer(self) -> pd.Series | None:
        return fastest(self.rows[self.rows["is_peer"]])

    @property
    def ours(self) -> pd.Series | None:
        return fastest(self.rows[~self.rows["is_peer"] & ~self.rows["method"].isin([PLANNER, UNTUNED])])

    @property
    def best(self) -> pd.Series | None:
        """What is ours or what the planner chose, whichever is faster."""
        return fastest(self.rows[~self.rows["is_peer"]])

    @property
    def sequential(self) -> pd.Series | None:
        return fastest(self.rows[self.rows["method"].str.startswith("sequential_")])


def fastest(rows: pd.DataFrame) -> pd.Series | None:
    return None if rows.empty else rows.loc[rows["time_us"].idxmin()]


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


def timed(row: pd.Series | None, name: bool = True) -> str:
    """ "persistent kernel, 62.1 [61, 63.2] µs"."""
    if row is None:
        return ABSENT
    shown = interval(row, "time", "us", us)
    return f"{look(row['method']).label}, {shown}" if name else shown


def over(before: pd.Series | None, after: pd.Series | None) -> str:
    return ABSENT if before is None or after is None else f"**{before['time_us'] / after['time_us']:.2f}×**"


def part(row: pd.Series | None) -> str:
    return ABSENT if row is None else f"{row['fraction_of_ideal']:.1%}"


def comparison(machine: Evidence) -> str:
    """Matmul + all-reduce: per layer and M the ideal, sequential code, the fastest peer, the fastest of ours, auto."""
    body = []
    for cell in cells(machine, MATMUL):
        any_row = cell.rows.iloc[0]
        backend = look(any_row["t_comm_backend"]).label if any_row["t_comm_backend"] else ABSENT
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


def planner(machine: Evidence) -> list[str]:
    """What the planner chose, how far its predictions were off, and what it loses where it was not tuned."""
    found = cells(machine, MATMUL)
    rows = [cell.planner for cell in found if cell.planner is not None]
    if not rows:
        raise Missing(f"the planner was not measured on {machine.name}")
    counts = pd.Series([row["plan"] for row in rows]).value_counts(sort=False)
    counts = counts.sort_values(ascending=False, kind="stable")
    lines = [f"tuned, it chose {', '.join(f'`{plan}` {count}×' for plan, count in counts.items())}"]
    errors = pd.Series([row["predicted_us"] / row["time_us"] - 1 for row in rows]).dropna().abs()
    if len(errors):
        lines.append(f"the time that its model predicts for that plan is off by {errors.median():.1%} in the median, "
                     f"{errors.max():.1%} at worst, over {len(errors)} points")  # fmt: skip
    losses = {cell.name: cell.rows.loc[UNTUNED, "time_us"] / cell.planner["time_us"] - 1 for cell in found
              if UNTUNED in cell.rows.index and cell.planner is not None}  # fmt: skip
    if losses:
        worst = max(losses, key=losses.get)
        near = sum(loss <= LINEAR_TOLERANCE for loss in losses.values())
        lines.append(f"untuned, by the model alone, it is within {LINEAR_TOLERANCE:.0%} of that in {near} of "
                     f"{len(losses)} points; at worst {losses[worst]:+.1%}, {worst}")  # fmt: skip
    return lines


# -- what limits each technique -------------------------------


def limits(machine: Evidence) -> str:
    """At many rows: how the matmul fills the GPU, what cutting it costs, and what each technique leaves exposed."""
    found = cells(machine, MATMUL)
    sizes = {cell.m for cell in found}
    chosen = LIMITS_ROWS if LIMITS_ROWS in sizes else max(sizes)
    body = []
    for cell in (cell for cell in found if cell.m == chosen):
        first = cell.rows.iloc[0]
        kinds = {
            "sequential": cell.sequential,
            "chunked": fastest(cell.rows[cell.rows["method"].str.startswith("chunked") & ~cell.rows["is_peer"]]),
            **{name: cell.rows.loc[name] if name in cell.rows.index else None for name in ("signalled", "persistent")},
        }
        cut = kinds["chunked"]
        cost = ABSENT
        if cut is not None and pd.notna(cut["t_matmul_chunked_us"]):
            cost = f"{cut['t_matmul_chunked_us'] / cut['t_matmul_us'] - 1:+.1%} ({look(cut['method']).label})"
        body.append([cell.layer, waves(first), us(first["t_matmul_us"]), us(first["t_comm_us"]), cost,
                     *(ABSENT if row is None else exposed(row) for row in kinds.values())])  # fmt: skip
    headers = [f"layer, M = {chosen}", "waves of tiles", "matmul", "best all-reduce", "cutting the matmul",
               *(f"ECT, {name}" for name in ("sequential", "chunked", "signalled", "persistent"))]  # fmt: skip
    return table(body, headers)


def waves(row: pd.Series) -> str:
    """How often the matmul's tiles fill all SMs, and how full the last wave leaves them on average."""
    if not row["num_sms"]:
        return ABSENT
    tiles = -(-row["m"] // TILE[0]) * -(-row["n"] // TILE[1])
    count = tiles / row["num_sms"]
    return f"{count:.2f}, {count / -(-tiles // row['num_sms']):.0%} filled"


def exposed(row: pd.Series) -> str:
    """The exposed communication time, and how much of the best all-reduce alone that is."""
    return f"{us(row['ect_us']) if row['ect_us'] > 0 else us(0.0)}, {row['ect_us'] / row['t_comm_us']:.0%}"


# -- what is to be reached ------------------------------------


@dataclass(frozen=True)
class Criterion:
    """One promise over many points: `values` by point, `holds` says of a value whether it keeps the promise."""

    label: str
    wanted: str
    values: dict[str, float]
    holds: Callable[[float], bool]
    show: Callable[[float], str]
    missing: tuple[str, ...] = ()
    least: bool = True  # the worst value is the least

    def row(self, launches: int) -> list[str]:
        if not self.values:
            return [self.label, self.wanted, ABSENT, "not measured"]
        kept = sum(map(self.holds, self.values.values()))
        worst = (min if self.least else max)(self.values, key=self.values.get)
        whole = kept == len(self.values) and not self.missing
        verdict = "**met**" if whole else f"**short**: {kept} of {len(self.values) + len(self.missing)} points"
        few = f" ({launches} of {TARGET_LAUNCHES} launches)" if launches < TARGET_LAUNCHES else ""
        return [self.label, self.wanted, f"worst {self.show(self.values[worst])} at {worst}", verdict + few]

    def exceptions(self) -> str:
        broken = sorted((name for name, value in self.values.items() if not self.holds(value)),
                        key=lambda name: self.values[name], reverse=not self.least)  # fmt: skip
        shown = [f"{name}: {self.show(self.values[name])}" for name in broken[:MOST_EXCEPTIONS]]
        shown += [f"{len(broken) - len(shown)} more"] if len(broken) > len(shown) else []
        return "; ".join([*shown, *(f"{name}: not measured" for name in self.missing)])


def ratios(found: Iterable[Cell], over_what: str, of_what: str) -> tuple[dict[str, float], tuple[str, ...]]:
    """Time of `over_what` over that of `of_what` by point, and the points that lack one of them."""
    values, missing = {}, []
    for cell in found:
        before, after = getattr(cell, over_what), getattr(cell, of_what)
        if before is None or after is None:
            missing.append(cell.name)
        else:
            values[cell.name] = before["time_us"] / after["time_us"]
    return values, tuple(missing)


def fractions(found: Iterable[Cell], of_what: str) -> tuple[dict[str, float], tuple[str, ...]]:
    rows = {cell.name: getattr(cell, of_what) for cell in found}
    present = {name: row["fraction_of_ideal"] for name, row in rows.items() if row is not None}
    return present, tuple(name for name, row in rows.items() if row is None)


def criteria(machine: Evidence) -> list[Criterion]:
    """Everything that is to be shown; raises Missing on a machine for which nothing was promised."""
    found = cells(machine, MATMUL)
    ranks = int(found[0].rows["tp"].iloc[0])
    if machine.kind != "cuda" or ranks not in LINEAR_TARGETS:
        raise Missing(f"targets are set for {' and '.join(map(str, LINEAR_TARGETS))} GPUs")
    wanted = LINEAR_TARGETS[ranks]
    many = [cell for cell in found if cell.m >= LINEAR_MANY_ROWS]
    few = [cell for cell in cells(machine, CHAIN) if cell.m <= LINEAR_FEW_ROWS]
    large, small = f"M ≥ {LINEAR_MANY_ROWS}", f"M ≤ {LINEAR_FEW_ROWS}"
    times, percent = "{:.2f}×".format, "{:.1%}".format
    slower = 1 / (1 + LINEAR_TOLERANCE)

    def compare(label, wanted_text, compared, least) -> Criterion:
        values, missing = compared
        return Criterion(label, wanted_text, values, lambda value: value >= least, times, missing)

    def reach(label, compared) -> Criterion:
        values, missing = compared
        return Criterion(label, f"≥ {wanted:.0%}", values, lambda value: value >= wanted, percent, missing)

    return [
        reach(f"{large}: fraction of ideal, fastest of ours", fractions(many, "ours")),
        reach(f"{large}: fraction of ideal, planner", fractions(many, "planner")),
        compare(f"{large}: fastest peer over fastest of ours", "> 1", ratios(many, "peer", "ours"), 1.0),
        compare(f"{large}: fastest peer over planner", "> 1", ratios(many, "peer", "planner"), 1.0),
        compare(f"{small}, chain: sequential NCCL over planner", f"≥ {LINEAR_CHAIN_SPEEDUP}×",
                ratios(few, "base", "planner"), LINEAR_CHAIN_SPEEDUP),
        compare(f"{small}, chain: fastest peer over planner", f"≥ {slower:.2f}×",
                ratios(few, "peer", "planner"), slower),
        compare("any M: fastest sequential arm over planner", f"≥ {slower:.2f}×",
                ratios(found, "sequential", "planner"), slower),
        errors(machine),
        *endurance(machine),
    ]  # fmt: skip


def errors(machine: Evidence) -> Criterion:
    """Relative error against float64 over that of plain code, of every method that is ours."""
    rows = machine.table("linear_all_reduce")
    rows = rows[~rows["is_peer"] & rows["correct"]]
    values = {
        f"{row.layer}, M = {row.m}, {look(row.method).label}": row.relative_error / row.base_error
        for row in rows.itertuples()
    }
    return Criterion("relative error over that of cuBLAS + NCCL", f"≤ {LINEAR_ERROR}×", values,
                     lambda value: value <= LINEAR_ERROR, "{:.2f}×".format, least=False)  # fmt: skip


def endurance(machine: Evidence) -> list[Criterion]:
    try:
        rows = machine.table("linear_endurance")
    except Missing:
        rows = pd.DataFrame(columns=["method", "num_repeats", "num_identical", "num_calls", "grown_bytes", "correct"])
    failed = tuple(look(name).label for name in rows.loc[~rows["correct"].astype(bool), "method"])
    rows = rows[rows["correct"].astype(bool)]
    names = [look(name).label for name in rows["method"]]
    repeats, calls = rows["num_repeats"].max(), rows["num_calls"].max()
    same = dict(zip(names, rows["num_identical"] / rows["num_repeats"], strict=True))
    grown = dict(zip(names, rows["grown_bytes"].astype(float), strict=True))
    return [
        Criterion(f"{repeats} repeats, bitwise the same" if names else "repeats, bitwise the same", "all", same,
                  lambda value: value == 1, "{:.1%}".format, failed),
        Criterion(f"{calls} calls of changing shapes: memory grows by" if names else "calls of changing shapes",
                  f"< {size_label(LINEAR_GROWTH_BYTES)}", grown, lambda value: value < LINEAR_GROWTH_BYTES,
                  lambda value: size_label(max(value, 0.0)), failed, least=False),
    ]  # fmt: skip


def targets(machine: Evidence) -> str:
    """Each promise with the worst point and whether it is kept; below it every point where it is not."""
    rows = machine.table("linear_all_reduce")
    promised = criteria(machine)
    launches = int(rows["num_launches"].min())
    # Repeats and calls are of one process by themselves.
    body = [one.row(launches if "repeats" not in one.label and "calls" not in one.label else TARGET_LAUNCHES)
            for one in promised]  # fmt: skip
    text = table(body, ["promise", "wanted", "measured", ""])
    broken = [f"- {one.label}: {one.exceptions()}" for one in promised if one.values and one.exceptions()]
    return text + ("\n\nEvery exception:\n\n" + "\n".join(broken) if broken else "")


def failures(machine: Evidence) -> list[str]:
    """A line for each method that failed somewhere: where, and why."""
    rows = machine.table("linear_all_reduce")
    rows = rows[~rows["correct"]]
    lines = []
    for (operation, method), group in rows.groupby(["operation", "method"], sort=False):
        of = len(machine.table("linear_all_reduce").query("operation == @operation and method == @method"))
        reasons = "; ".join(dict.fromkeys(group["error"]))
        lines.append(f"{look(method).label} ({operation}): failed at {len(group)} of {of} points: {reasons}")
    return lines
