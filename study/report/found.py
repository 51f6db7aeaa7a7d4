"""One finding of the report's summary."""

import pathlib
from collections.abc import Callable
from dataclasses import dataclass

from study.published.criteria import milliseconds
from study.results.evidence import Evidence


@dataclass(frozen=True)
class Found:
    """One finding: a sentence, the figure that shows it, whether intervals decide it, and the numbers behind it."""

    sentence: str
    figure: str
    decided: bool
    lines: list[str]


Candidate = Callable[[Evidence, pathlib.Path], Found]


def speedup(before_us: float, after_us: float) -> str:
    return f"{before_us / after_us:.2f}× ({milliseconds(before_us / 1e3)} → {milliseconds(after_us / 1e3)})"


def span(values) -> str:
    """ "1.05×" or "0.97–1.05×"."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{low}×" if low == high else f"{low}–{high}×"
