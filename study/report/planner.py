"""The planner judged over every measured point: its time beside the best of sequential and every technique."""

from dataclasses import dataclass

import pandas as pd

from study.drawing.looks import look
from study.drawing.style import size_label
from study.published.criteria import PLANNER_TOLERANCE
from study.report.report_tables import interval, table, us
from study.report.techniques import PLANNER, plan_of
from study.results.evidence import Evidence, Missing

WITHIN, UNDECIDED, SLOWER, FAILED = "within", "undecided", "slower", "failed"


@dataclass(frozen=True)
class Choice:
    """The planner at one point. `row` and `best`: its row and that of the fastest other arm, sequential among them.

    `loss` and `sequential_loss`: its time over that of the best and of sequential, less 1. A verdict is "within" the
    tolerance, "undecided" where the loss is larger and the intervals allow less, "slower", or "failed".
    """

    point: str
    row: pd.Series
    best: pd.Series
    loss: float
    verdict: str
    sequential_loss: float
    sequential_verdict: str


def compared(row: pd.Series, other: pd.Series) -> tuple[float, str]:
    """(loss, verdict) of the planner's row against another arm's of the same point."""
    loss = row["t_overlap_us"] / other["t_overlap_us"] - 1
    if pd.isna(loss):
        return loss, FAILED
    if loss <= PLANNER_TOLERANCE:
        return loss, WITHIN
    beyond_noise = row["t_overlap_lo_us"] > (1 + PLANNER_TOLERANCE) * other["t_overlap_hi_us"]
    return loss, SLOWER if beyond_noise else UNDECIDED


def choices(evidence: Evidence) -> list[Choice]:
    """Every point of the device protocol with the planner's arm; raises Missing when there is none."""
    rows = evidence.table("overlap")
    rows = rows[rows["protocol"] == "device"]
    found = []
    for (configuration, size, n), group in rows.groupby(["configuration", "comm_bytes", "matmul_n"], sort=False):
        group = group.set_index("method", drop=False)
        others = group[group["method"].ne(PLANNER)].dropna(subset=["t_overlap_us"])
        if PLANNER not in group.index or "sequential" not in others.index:
            continue
        row, best = group.loc[PLANNER], others.loc[others["t_overlap_us"].idxmin()]
        where = "" if configuration == "sweep" else f" ({configuration})"
        found.append(Choice(f"{size_label(size)}, n = {n}{where}", row, best, *compared(row, best),
                            *compared(row, others.loc["sequential"])))  # fmt: skip
    if not found:
        raise Missing(f"the planner was not measured on {evidence.name}")
    return found


def judgement(machine: Evidence) -> str:
    """How the planner fares, and a table of the points where it is slower than the best beyond noise."""
    found = choices(machine)
    by = {verdict: [one for one in found if one.verdict == verdict] for verdict in (WITHIN, UNDECIDED, SLOWER, FAILED)}
    text = (
        f"Of {len(found)} points (the published configurations and the sweep) the planner is within "
        f"{PLANNER_TOLERANCE:.0%} of the best of sequential and every technique measured there in {len(by[WITHIN])}"
    )
    if by[UNDECIDED]:
        worst = max(one.loss for one in by[UNDECIDED])
        text += (
            f"; in {len(by[UNDECIDED])} more, where the loss is up to {worst:.1%}, the intervals leave that undecided"
        )
    text += f"; slower by more than that, beyond noise, in {len(by[SLOWER])}"
    if by[FAILED]:
        text += f"; failed in {len(by[FAILED])} ({', '.join(one.point for one in by[FAILED])})"
    lost = [one for one in found if one.sequential_verdict == SLOWER]
    text += (
        f". Against sequential alone it is more than {PLANNER_TOLERANCE:.0%} slower beyond noise in {len(lost)}"
        + (f" ({', '.join(f'{one.point}: {one.sequential_loss:.1%}' for one in lost)})" if lost else "")
        + f". It chose: {chosen(found)}."
    )
    if not by[SLOWER]:
        return text
    body = [
        [one.point, f"`{plan_of(one.row)}`", interval(one.row, "t_overlap", "us", us), f"{one.loss:.1%}",
         f"{look(one.best['method']).label}, {interval(one.best, 't_overlap', 'us', us)}"]
        for one in sorted(by[SLOWER], key=lambda one: -one.loss)
    ]  # fmt: skip
    exceptions = table(body, ["all-reduce, matmul", "plan (of the first launch)", "planner", "loss", "best"])
    return f"{text} The exceptions:\n\n{exceptions}"


def chosen(found: list[Choice]) -> str:
    """How often each plan was chosen, the most frequent first."""
    counts = pd.Series([plan_of(one.row) for one in found if one.verdict != FAILED]).value_counts(sort=False)
    counts = counts.sort_values(ascending=False, kind="stable")
    return ", ".join(f"`{plan}` {count}×" for plan, count in counts.items()) or "nothing"
