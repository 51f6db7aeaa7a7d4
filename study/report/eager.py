"""What launching does to overlap: the times of eager code beside those of a replayed CUDA graph, in both roles."""

import pandas as pd

from study.drawing.looks import look, ordered
from study.harness.markdown import verbatim
from study.report.report_tables import ABSENT, table, us
from study.report.techniques import PLANNER, geometric
from study.results.evidence import Evidence, Missing

MODES = ("graph", "eager")
LATE = 0.05  # the part of late samples from which on a row is named
PLAIN = "two_stream"
KEY = ["configuration", "method", "leads"]


def told(machine: Evidence) -> str:
    """What eager launches cost each role on one machine, and every time and speedup; raises Missing without data."""
    rows = machine.table("overlap_eager")
    done = rows.dropna(subset=["t_overlap_us"])
    if done.empty:
        reasons = [error for error in rows["error"].unique() if error]
        raise Missing("; ".join(reasons) or "the table overlap_eager has no finished row")
    captured = "graph" in set(rows["launched"])
    compared = roles(done) if captured else ["Nothing is captured in a CUDA graph here: the host issues all of it."]
    parts = [" ".join([*compared, *plain(done), *planner(done), *late(done)]), times(rows)]
    return "\n\n".join(filter(None, parts))


def order(machine: Evidence) -> list[str]:
    """What launches cost each role, for the findings; nothing where it was not measured."""
    if "overlap_eager" not in machine.tables:
        return []
    done = machine.tables["overlap_eager"].dropna(subset=["t_overlap_us"])
    return [line.rstrip(".") for line in [*roles(done), *plain(done)]]


def roles(done: pd.DataFrame) -> list[str]:
    """How much longer eager code takes than a graph, by what is on the side stream."""
    both = done.pivot(index=KEY, columns="launched", values="t_overlap_us").reindex(columns=MODES)
    techniques = both[~both.index.get_level_values("method").isin(["sequential", PLANNER])].dropna()
    ratios = techniques["eager"] / techniques["graph"]
    parts = []
    for leads, side in ((False, "the all-reduce"), (True, "the matmul")):
        mine = ratios[ratios.index.get_level_values("leads") == leads]
        if len(mine):
            name, method, _ = mine.idxmax()
            parts.append(
                f"{geometric(mine):.2f}× with {side} on the side stream (geometric mean of {len(mine)}; at most "
                f"{mine.max():.2f}×: {look(method).label} in “{name}”)"
            )
    if not parts:
        return []
    return [f"In eager code, behind queued work, the techniques take so many times as long as in a CUDA "
            f"graph: {', and '.join(parts)}."]  # fmt: skip


def plain(done: pd.DataFrame) -> list[str]:
    """What the published technique gains in eager code, and the same two kernels with the streams exchanged."""
    mine = done[done["method"].eq(PLAIN) & done["launched"].eq("eager")].dropna(subset=["speedup"])
    if set(mine["leads"]) != {False, True}:
        return []
    side, leading = (ends(mine.loc[mine["leads"].eq(leads), "speedup"]) for leads in (False, True))
    return [f"{look(PLAIN).label[0].upper()}{look(PLAIN).label[1:]} gain {side} there over sequential code, which is "
            f"eager too, and {leading} leading."]  # fmt: skip


def ends(values: pd.Series) -> str:
    """ "0.95× to 1.24×"."""
    return " to ".join(dict.fromkeys(f"{value:.2f}×" for value in (values.min(), values.max())))


def planner(done: pd.DataFrame) -> list[str]:
    """What the planner's choices gain in eager code over sequential code, which is eager too."""
    mine = done[done["method"].eq(PLANNER) & done["launched"].eq("eager")]["speedup"].dropna()
    if mine.empty:
        return []
    return [f"What the planner chose gains {ends(mine)} there over sequential code, issued eagerly too."]


def late(done: pd.DataFrame) -> list[str]:
    """Where the host did not keep up, so that the GPU had no work queued."""
    count = int((done["late_part"] > LATE).sum())
    if not count:
        return []
    worst = done["late_part"].max()
    return [f"In {count} of {len(done)} rows the host issued more than {LATE:.0%} of the samples late (up to "
            f"{worst:.0%}): there the GPU had run out of work."]  # fmt: skip


def times(rows: pd.DataFrame) -> str:
    """A line per method and role, a column per configuration: in a graph, then eagerly."""
    present = list(rows["configuration"].unique())
    modes = [mode for mode in MODES if mode in set(rows["launched"])]
    body = []
    for method in ordered(rows["method"]):
        of_method = rows[rows["method"] == method]
        # The planner leads or not as it chose; the others are measured both ways.
        for leads in (None,) if method == PLANNER else sorted(of_method["leads"].unique()):
            mine = of_method if leads is None else of_method[of_method["leads"] == leads]
            cells = [[shown(mine, name, mode) for mode in modes] for name in present]
            label = look(method).label + (", leading" if leads else "")
            body.append([label, *(" → ".join(cell) for cell in cells)])
    return table(body, [f"method ({' → '.join(modes)})", *present])


def shown(rows: pd.DataFrame, configuration: str, mode: str) -> str:
    """ "187 µs, 1.31×" or what went wrong."""
    here = rows[(rows["configuration"] == configuration) & (rows["launched"] == mode)]
    if here.empty:
        return ABSENT
    row = here.iloc[0]
    if pd.isna(row["t_overlap_us"]):
        return f"failed: {verbatim(row['error'])}"
    gained = row["method"] != "sequential" and pd.notna(row["speedup"])
    return us(row["t_overlap_us"]) + (f", {row['speedup']:.2f}×" if gained else "")
