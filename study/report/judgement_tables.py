"""The report's tables of what is judged: the claims, and earlier measurements."""

import pathlib

import pandas as pd

from study.claims import earlier
from study.claims.judge import Judgement
from study.drawing.style import digits
from study.harness.markdown import verbatim
from study.published.criteria import NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED
from study.report.report_tables import folded, table
from study.results.evidence import Evidence


def claim_verdicts(judged: dict[str, list[Judgement]], section: str | None = None) -> str:
    """One row per published claim, a column of verdicts per machine."""
    first = next(iter(judged.values()))
    rows = [
        [claim.sentence, *(judgements[place].verdict for judgements in judged.values())]
        for place, claim in enumerate(first)
        if section in (None, claim.section)
    ]
    return table(rows, ["published", *map(verbatim, judged)])


def claim_numbers(judgements: list[Judgement]) -> str:
    """The numbers behind each verdict of one machine."""
    return table([[entry.sentence, f"**{entry.verdict}**", entry.numbers] for entry in judgements],
                 ["published", "verdict", "numbers behind it"])  # fmt: skip


def claim_counts(judged: dict[str, list[Judgement]]) -> str:
    verdicts = (REPRODUCED, NOT_REPRODUCED, NOT_TESTABLE)
    rows = [[verbatim(name), *(str(sum(entry.verdict == verdict for entry in judgements)) for verdict in verdicts)]
            for name, judgements in judged.items()]  # fmt: skip
    return table(rows, ["machine", *verdicts])


def agreement(machine: Evidence, root: pathlib.Path) -> str:
    """Ours beside what was measured earlier on the same hardware; raises Missing when there is nothing to compare."""
    found = earlier.compare(machine, root)
    # The same may have been measured more than once earlier, by different programs: each row says by which.
    sources = list(dict.fromkeys(one.source for one in found))
    marks = {source: f" ({number})" if len(sources) > 1 else "" for number, source in enumerate(sources, 1)}
    rows = []
    for one in found:
        before = digits(one.low) if one.low == one.high else f"{digits(one.low)}–{digits(one.high)}"
        ends = "" if pd.isna(one.ours_lo) else f" [{digits(one.ours_lo)}, {digits(one.ours_hi)}]"
        here = f"{digits(one.ours)}{ends} {one.unit}"
        agrees = "yes" if one.agrees else "**no**"
        rows.append([one.what, here, f"{before} {one.unit}{marks[one.source]}", f"{one.ratio:.2f}", agrees, one.why])
    agree = sum(one.agrees for one in found)
    told = " · ".join(f"{marks[source]} {source}".strip() for source in sources)
    head = f"{agree} of {len(found)} earlier values agree with ours within {earlier.TOLERANCE:.0%}. Measured earlier: "
    head += f"{told}."
    headers = ["measured", "here", "earlier", "ratio", f"within {earlier.TOLERANCE:.0%}", "where not, why"]
    return f"{head}\n\n{folded('Every value', table(rows, headers))}"
