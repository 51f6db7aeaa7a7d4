"""What it costs a matmul when SMs (or a CPU's cores) are taken from it, and how much of them is free to take."""

import pandas as pd

from study.harness.markdown import verbatim
from study.published.criteria import FREE_SLOWDOWN
from study.report.report_tables import ABSENT, table, us
from study.results.evidence import Evidence, Missing
from study.sections.overlap.figure_sm_sharing import HELD, WHOLE, slowdowns


def measured(evidence: Evidence) -> pd.DataFrame:
    """The slowdowns of one machine; raises Missing when there are none."""
    table_rows = evidence.table("sm_sharing")
    rows = slowdowns(table_rows)
    if rows.empty:
        reasons = [error for error in table_rows["error"].unique() if error]
        raise Missing("; ".join(reasons) or "the table sm_sharing has no finished row")
    return rows


def free_part(rows: pd.DataFrame) -> float:
    """The largest part of the matmul's time for which SMs may be held, those below it too, at FREE_SLOWDOWN or less.

    `rows`: the holds of one matmul and one number of SMs. 0 where the shortest hold costs more.
    """
    part = 0.0
    for row in rows.sort_values("hold_part").itertuples():
        if row.slowdown > 1 + FREE_SLOWDOWN:
            break
        part = row.hold_part
    return part


def told(machine: Evidence) -> str:
    """What taking SMs (or cores) costs on one machine: what is free to hold, and the other ways to take them."""
    rows = measured(machine)
    parts = []
    if rows["technique"].eq(HELD).any():
        parts.append(
            "The longest that so many of them may be held by another kernel before the matmul takes "
            f"{FREE_SLOWDOWN:.0%} longer, and what they cost when they are held to the end. The shorter a collective "
            "holds them, the less it costs: `maco_staged_8` and `maco_staged_12` hold a few in their first half only, "
            "to reduce, and leave the rest to the copy engine."
        )
        parts.append(free(rows[rows["technique"] == HELD]))
    if lines := taken(machine.table("sm_sharing"), rows):
        means = "by other means:" if parts else "by these means:"
        parts += [f"Taken for the whole matmul {means}", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts)


def free(held: pd.DataFrame) -> str:
    """Per number of SMs and matmul: for how long they may be held at next to no cost, and what holding them costs."""
    sizes = sorted(held["matmul_n"].unique())
    body = []
    for num_sms, of_number in held.groupby("num_sms"):
        cells = []
        for n in sizes:
            holds = of_number[of_number["matmul_n"] == n]
            if holds.empty:
                cells.append(ABSENT)
                continue
            part, whole = free_part(holds), holds.loc[holds["hold_part"].idxmax()]
            least = holds.loc[holds["hold_part"].idxmin()]
            alone = whole["t_alone_us"]
            shown = f"{part:.0%} ({us(part * alone)} of {us(alone)})" if part else (
                f"below {least['hold_part']:.0%} of {us(alone)} (which costs {least['slowdown']:.2f}×)")  # fmt: skip
            cells.append(f"{shown}; held for {whole['hold_part']:.0%}: {whole['slowdown']:.2f}×")
        body.append([str(num_sms), *cells])
    return table(body, ["SMs held", *(f"n = {n}, free" for n in sizes)])


def taken(everything: pd.DataFrame, rows: pd.DataFrame) -> list[str]:
    """A line per other way to take SMs (or cores) for the whole matmul: the slowdown by number and n, or why not."""
    lines = []
    for technique, label in WHOLE.items():
        asked, found = everything[everything["asked"] == technique], rows[rows["technique"] == technique]
        if asked.empty:
            continue
        parts = [
            f"n = {n}: " + ", ".join(f"{row.num_sms} taken {row.slowdown:.2f}×" for row in of_size.itertuples())
            for n, of_size in found.groupby("matmul_n")
        ]
        errors = [verbatim(error) for error in asked["error"].unique() if error]
        most = found[found["num_sms"] == found["num_sms"].max()]["slowdown"]
        held = rows[(rows["technique"] == HELD) & (rows["num_sms"] == found["num_sms"].max())]["slowdown"]
        if len(most) and len(held) and most.max() <= 1 + FREE_SLOWDOWN < held.max():
            errors.append(f"with the most of them taken no matmul slows, though it should (held: up to "
                          f"{held.max():.2f}×): it evidently still uses them")  # fmt: skip
        lines.append(f"{label}: {'; '.join([*parts, *errors]) or 'nothing was measured'}")
    return lines


def whole_waves(evidence: Evidence, n: int) -> str:
    """What the least and the greatest number of SMs, held throughout, cost a matmul of size `n`, as a sentence's end.

    A matmul is cut into tiles of which every SM does a whole number: where few SMs cost at least half of what many do,
    it is that which costs, not the SMs' share of the work. Raises Missing without such measurements.
    """
    rows = measured(evidence)
    rows = rows[(rows["technique"] == HELD) & (rows["matmul_n"] == n)]
    rows = rows[rows["hold_part"] == rows["hold_part"].max()].sort_values("num_sms")
    if len(rows) < 2:
        raise Missing(f"no SMs were held beside a matmul of n = {n}")
    few, many = rows.iloc[0], rows.iloc[-1]
    text = (
        f"{few['num_sms']} SMs held throughout make a matmul of n = {n} take {few['slowdown']:.2f}× as long, "
        f"{many['num_sms']} SMs {many['slowdown']:.2f}×"
    )
    if few["slowdown"] > 1 + FREE_SLOWDOWN and few["slowdown"] - 1 >= (many["slowdown"] - 1) / 2:
        text += ": its tiles come in whole waves, and without a few SMs it needs one wave more"
    return text
