"""Section 5: the persistent kernel's order of memory: tiles handed over, launches gone wrong, what strictness costs."""

import pandas as pd

from study.harness.markdown import verbatim
from study.report.report_tables import ABSENT, table
from study.results.evidence import Evidence, Missing

HAND_OVER, STRICT_COST = "hand_over", "strict_cost"
FENCES = {False: "default", True: "strict"}


def rows_of(machine: Evidence, name: str) -> pd.DataFrame:
    """Raises Missing where the table is not there, or is of a run that asked for none of its points."""
    rows = machine.table(name)
    if rows.empty:
        raise Missing(f"no point of {name} was asked for")
    return rows


def is_measured(machine: Evidence, name: str) -> bool:
    """Whether the machine has points of that table."""
    return name in machine.tables and not machine.tables[name].empty


def hand_over(machine: Evidence) -> str:
    """Each run with the tiles it handed over and its wrong launches, or why there was none."""
    body = []
    for row in rows_of(machine, HAND_OVER).itertuples():
        wrong = f"**{row.num_wrong}**" if row.num_wrong else "0" if row.correct else ABSENT
        short = f" of {row.asked_tiles:,} asked" if row.num_tiles < row.asked_tiles else ""
        failed = "" if row.correct else verbatim(row.error)
        shape = f"{row.layer}, {row.m} × {row.n}, K = {row.k}"
        body.append([shape, row.launch, FENCES[row.strict], f"{row.num_tiles:,}{short}", f"{row.num_launches_done:,}",
                     wrong, failed])  # fmt: skip
    return table(body, ["layer", "launched", "fence", "tiles", "launches", "wrong launches", ""])


def strict_cost(machine: Evidence) -> str:
    """The strict fence's time over the default one's: the median over the points and the worst of them."""
    rows = rows_of(machine, STRICT_COST)
    done = rows[rows["correct"]]
    wrong = f"{len(rows) - len(done)} of {len(rows)}"
    if done.empty:
        return table([[wrong, ABSENT, ABSENT, "", verbatim(rows["error"].iloc[0])]], HEADERS)
    worst = done.loc[done["ratio"].idxmax()]
    told = f"{worst['ratio'] - 1:+.1%} [{worst['ratio_lo'] - 1:+.1%}, {worst['ratio_hi'] - 1:+.1%}]"
    failed = "; ".join(dict.fromkeys(map(verbatim, rows.loc[~rows["correct"], "error"])))
    at = f"{worst['layer']}, M = {worst['m']}"
    return table([[wrong, f"{done['ratio'].median() - 1:+.1%}", told, at, failed]], HEADERS)


HEADERS = ["points that failed", "median", "worst", "at", ""]
