"""What a figure of a section is: `FIGURES` of the section's modules figure*.py lists them, `study.report.figures` draws
them.

A figure is added by adding its file, as study/sections/bandwidth/figure_mine.py:

    def mine(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]: ...

    FIGURES = (FigureSpec("bandwidth_mine", "bandwidth", ("bandwidth",), "What it shows.", mine),)

It is then drawn with the others, and shown at the end of the section's notebook and of its part of the report, until
these name it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

Draw = Callable[[Mapping[str, pd.DataFrame], str], tuple[Figure, pd.DataFrame]]


@dataclass(frozen=True)
class FigureSpec:
    """One figure: its section, and the tables it is drawn from ("published.X" is the published study's).

    draw(tables, machine_name): the figure, and the numbers in it. `optional` tables add to the figure where the machine
    has them. place: among the section's figures; without one, behind those that have one.
    """

    name: str
    section: str
    tables: tuple[str, ...]
    caption: str
    draw: Draw
    optional: tuple[str, ...] = ()
    place: float = float("inf")
