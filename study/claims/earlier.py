"""Agreement of stored tables with earlier measurements of the same hardware: `data/earlier/*.csv`.

A row there names the hardware ("h200-x2", or a pattern such as "h200-x*"), one of our tables, a column of it, the row
by a selector "name=value; name=value", and the earlier value as a range [low, high] with its unit and source.
`otherwise` changes the selector to another row of ours that was measured as the earlier one was, and `note` says how
the earlier one differs.
"""

import fnmatch
import math
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from study.results.evidence import Evidence, Missing

TOLERANCE = 0.10
COLUMNS = ["hardware", "table", "column", "selector", "low", "high", "unit", "otherwise", "note", "source"]


@dataclass(frozen=True)
class Comparison:
    """One earlier value beside ours, in `unit`; `low`, `high` is the earlier range, `ours_lo`, `ours_hi` our interval.

    `kind` is what is measured without its size (rows of one kind differ in size only); `why` is "" where they agree.
    """

    what: str
    kind: str
    size: float
    ours: float
    ours_lo: float
    ours_hi: float
    low: float
    high: float
    unit: str
    why: str
    source: str

    @property
    def ratio(self) -> float:
        """Ours over the middle of the earlier range."""
        return 2 * self.ours / (self.low + self.high)

    @property
    def agrees(self) -> bool:
        return self.low * (1 - TOLERANCE) <= self.ours <= self.high * (1 + TOLERANCE)


def read(root: pathlib.Path, hardware: str) -> pd.DataFrame:
    """The earlier values of `hardware` as strings; raises ValueError naming a file that lacks a column."""
    parts = [pd.DataFrame(columns=COLUMNS)]
    for path in sorted((root / "data" / "earlier").glob("*.csv")):
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
        absent = [name for name in COLUMNS if name not in rows]
        if absent:
            raise ValueError(f"data/earlier/{path.name} lacks the columns {', '.join(absent)}")
        parts.append(rows[[fnmatch.fnmatch(hardware, pattern) for pattern in rows["hardware"]]])
    return pd.concat(parts, ignore_index=True)


def selected(table: pd.DataFrame, selector: dict[str, str]) -> pd.DataFrame:
    """The rows whose columns have the selector's values; numbers compare as numbers."""
    chosen = pd.Series(True, index=table.index)
    for name, value in selector.items():
        numeric = pd.api.types.is_numeric_dtype(table[name])
        chosen &= table[name] == (float(value) if numeric else value)
    return table[chosen]


def parsed(selector: str) -> dict[str, str]:
    """ "a=1; b=x" -> {"a": "1", "b": "x"}; raises ValueError naming a part without "="."""
    pairs = [part.strip().partition("=") for part in selector.split(";") if part.strip()]
    for name, equals, _ in pairs:
        if not equals:
            raise ValueError(f"{name!r} in the selector {selector!r} of data/earlier is not name=value")
    return {name: value for name, _, value in pairs}


def measurement(evidence: Evidence, table: str, column: str, selector: dict[str, str]) -> tuple[float, float, float]:
    """(value, lo, hi) of the one row selected, the extremes of several; NaN for the ends of a column without intervals.

    Raises Missing when nothing was measured.
    """
    rows = selected(evidence.table(table), selector).dropna(subset=[column])
    if rows.empty:
        raise Missing("not measured here")
    stem, _, unit = column.rpartition("_")
    ends = [f"{stem}_{end}_{unit}" if stem else f"{column}_{end}" for end in ("lo", "hi")]
    if ends[0] not in rows and len(rows) == 1:
        return float(rows[column].iloc[0]), math.nan, math.nan
    low, high = (rows[end] if end in rows else rows[column] for end in ends)
    return float(rows[column].median()), float(low.min()), float(high.max())


def compare(evidence: Evidence, root: pathlib.Path) -> list[Comparison]:
    """Every earlier value of this hardware that the machine has a counterpart of; raises Missing when there is none."""
    entries = read(root, evidence.hardware)
    if entries.empty:
        raise Missing(f"no earlier measurement of {evidence.hardware} is on file")
    found = []
    for entry in entries.itertuples():
        selector = parsed(entry.selector)
        try:
            ours = measurement(evidence, entry.table, entry.column, selector)
        except Missing:
            continue
        sizes = [float(selector[name]) for name in ("bytes", "n") if name in selector]
        kind = " ".join([entry.table, *(v for name, v in selector.items() if name not in ("bytes", "m", "n", "k"))])
        one = Comparison(described(entry.table, selector), f"{kind} {entry.source}", sizes[0] if sizes else 0.0, *ours,
                         float(entry.low), float(entry.high), entry.unit, "", entry.source)  # fmt: skip
        found.append((one, entry))
    if not found:
        raise Missing("nothing that was measured earlier is measured here yet")
    everything = [one for one, _ in found]
    return [
        one if one.agrees else Comparison(**{**vars(one), "why": why(evidence, one, entry, everything)})
        for one, entry in found
    ]


def why(evidence: Evidence, one: Comparison, entry, others: Iterable[Comparison]) -> str:
    """What the data say about a disagreement; "not known" where they say nothing."""
    reasons = [entry.note] if entry.note else []
    if entry.otherwise:
        alike = {**parsed(entry.selector), **parsed(entry.otherwise)}
        try:
            value, *_ = measurement(evidence, entry.table, entry.column, alike)
            ratio = 2 * value / (one.low + one.high)
            agrees = one.low * (1 - TOLERANCE) <= value <= one.high * (1 + TOLERANCE)
            arm = " ".join(parsed(entry.otherwise).values())
            reasons.append(f"our arm `{arm}` does so: {value:.3g} {one.unit}, {ratio:.2f} of the earlier value, "
                           f"{'which agrees' if agrees else 'which differs too'}")  # fmt: skip
        except Missing:
            reasons.append("no arm of ours does so")
    known = not math.isnan(one.ours_lo)
    nearest = min(one.ours_hi, max(one.ours_lo, one.low)) if known else one.ours  # of our interval to the earlier value
    if one.low <= nearest <= one.high:
        reasons.append("the earlier value lies within our interval over all launches")
    elif one.low * (1 - TOLERANCE) <= nearest <= one.high * (1 + TOLERANCE):
        reasons.append(f"our interval over all launches comes within {TOLERANCE:.0%} of it")
    larger = [other for other in others if other.kind == one.kind and other.size > one.size and other.unit == "µs"]
    if larger and max(larger, key=lambda other: other.size).agrees:
        end = max(larger, key=lambda other: other.size)
        reasons.append(f"the two agree at the largest size ({end.ratio:.2f}), so the link's rate is the same and the "
                       f"{abs(one.ours - (one.low + one.high) / 2):.2g} µs lie in the start of a call (latency, choice "
                       "of algorithm)")  # fmt: skip
    return "; ".join(reasons) or "not known"


def described(table: str, selector: dict[str, str]) -> str:
    """The selector for a reader: "bandwidth: all_reduce, nccl, 8388608 bytes"."""
    words = {"bytes": "{} bytes", "n": "n = {}", "batch": "batch {}"}
    hidden = ("m", "k", "protocol", "prompt_tokens", "new_tokens")
    parts = [words.get(name, "{}").format(value) for name, value in selector.items() if name not in hidden]
    return f"{table}: {', '.join(parts)}"
