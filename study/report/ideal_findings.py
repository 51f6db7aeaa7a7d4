"""The summary's finding about the project's question: how much of the ideal, and of its gain, a machine gets."""

import math
import pathlib
from collections.abc import Sequence

import pandas as pd

from study.drawing.looks import look
from study.harness.markdown import verbatim
from study.published.criteria import LINEAR_MANY_ROWS
from study.report import linear_persistent, techniques
from study.report.found import Found, speedup
from study.report.report_tables import ABSENT, table
from study.results.evidence import Evidence, Missing


def near_ideal(evidence: Evidence, root: pathlib.Path) -> Found:
    """How near the fastest technique comes to the ideal, in which configuration it does not, and why."""
    groups = techniques.configurations(evidence, root)
    best = {name: techniques.fastest(group) for name, group in groups.items()}
    parts = {name: techniques.fraction(row) for name, row in best.items()}
    values = [value for value, _, _ in parts.values()]
    furthest = min(parts, key=lambda name: parts[name])
    names = "; ".join(dict.fromkeys(look(row["method"]).label for row in best.values()))
    count = len({method for group in groups.values() for method in techniques.overlapped(group).index})
    who = f"fastest of {count} techniques" if count > 1 else "only technique"
    sentence = f"The {who} ({names}) reaches {ends(values)} of the ideal"
    try:
        wanted = techniques.targets_of(evidence).fraction_of_ideal
        good = sum(value >= wanted for value in values)
        undecided = sum(low < wanted <= high for _, low, high in parts.values())
        sentence += f", {wanted:.0%} or more in {good} of {len(values)} configurations"
        sentence += f" (by the intervals undecided in {undecided})" if undecided else ""
        short = [name for name, (value, _, _) in parts.items() if value < wanted]
    except Missing:
        short = [furthest] if parts[furthest][0] < 1 else []
    sentence += of_the_gain(list(best.values()))
    if len(values) > 1:
        sentence += f"; it is furthest from the ideal in “{furthest}”"
    lines = []
    for name, row in best.items():
        text = (f"{name}: {look(row['method']).label} {speedup(row['t_seq_us'], row['t_overlap_us'])}, "
                f"{reached(row)}; the ideal is {speedup(row['t_seq_us'], row['ideal_us'])}")  # fmt: skip
        planned = techniques.planned(groups[name])
        if planned is not None:
            text += f"; the planner {reached(planned)} by `{techniques.plan_of(planned)}`"
        lines.append(text)
    for name in short:
        lines += techniques.what_holds_back(evidence, groups[name])
    return Found(sentence, "overlap_techniques", True, lines)


def reached(row: pd.Series) -> str:
    """How much of the ideal, and of the ideal gain where there is one."""
    gain = techniques.gain_percent(row)
    return f"{techniques.percent(row)} of the ideal" + ("" if gain == ABSENT else f" and {gain} of the ideal gain")


def of_the_gain(rows: list[pd.Series]) -> str:
    """The part of the ideal gain over all configurations, as a sentence's middle; "" where none has a gain to share."""
    parts = [part for part in map(techniques.gain_fraction, rows) if not math.isnan(part[0])]
    if not parts:
        return ""
    values = [value for value, _, _ in parts]
    text = f", and {ends(values)} of the ideal gain"
    few, unsure = len(rows) - len(parts), sum(low <= 0 <= high for _, low, high in parts)
    notes = [f"not told in {few} of {len(rows)}, where there is too little to gain"] if few else []
    notes += [f"the interval holds 0 in {unsure}"] if unsure else []
    return text + (f" ({'; '.join(notes)})" if notes else "")


def overview(machines: Sequence[Evidence], root: pathlib.Path) -> str:
    """A row per machine: the fraction of the ideal gain by three techniques, of the ideal by the persistent kernel."""
    body = []
    for machine in machines:
        try:
            groups = techniques.configurations(machine, root).values()
        except Missing:
            groups = ()
        plain = [group.loc["two_stream"] for group in groups if "two_stream" in group.index]
        best, planned = ([row for row in map(choose, groups) if row is not None]
                         for choose in (techniques.fastest, techniques.planned))  # fmt: skip
        state = machine.sections["overlap"]
        name = verbatim(machine.name) + ("" if state.usable else f" (overlap: {state.state})")
        body.append([name, *map(gains, (plain, best, planned)), persistent(machine)])
    return table(body, ["machine", "two streams", "fastest technique", "planner",
                        f"one kernel, of the ideal, M ≥ {LINEAR_MANY_ROWS}"])  # fmt: skip


def gains(rows: list[pd.Series]) -> str:
    """ "90% to 98%" of the ideal gain and in how many the interval holds 0, or "–" where none can be told."""
    parts = [part for part in map(techniques.gain_fraction, rows) if not math.isnan(part[0])]
    if not parts:
        return ABSENT
    unsure = sum(low <= 0 <= high for _, low, high in parts)
    return ends([value for value, _, _ in parts]) + (f" (undecided in {unsure} of {len(parts)})" if unsure else "")


def ends(values: list[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:.0%}" for value in (min(values), max(values))))


def persistent(machine: Evidence) -> str:
    try:
        reached = [row["fraction_of_ideal"] for _, row in linear_persistent.finished(machine)]
    except Missing:
        return ABSENT
    if not reached:
        return ABSENT
    state = machine.sections["linear_all_reduce"]
    return ends(reached) + ("" if state.usable else f" ({state.state})")
