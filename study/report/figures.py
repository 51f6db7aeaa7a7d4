"""The figures of the study: drawn from stored tables only, equal byte for byte for equal data."""

import importlib
import pathlib
import pkgutil
import traceback

import pandas as pd
from matplotlib.figure import Figure

from study import sections
from study.drawing import style
from study.drawing.figure import FigureSpec
from study.published import tables as published
from study.results.store import DataError, Store
from study.sections.registry import SECTIONS


def found() -> dict[str, FigureSpec]:
    """Those of the sections' modules figure*.py (see `study.drawing.figure`), by name in the order of the report.

    Within a section by `place`, then those of figures.py before others; ValueError where two have the same name.
    """
    specs: dict[str, FigureSpec] = {}
    for section in SECTIONS:
        package = importlib.import_module(f"{sections.__name__}.{section}")
        names = [entry.name for entry in pkgutil.iter_modules(package.__path__) if entry.name.startswith("figure")]
        names.sort(key=lambda name: (name != "figures", name))
        own = [spec for name in names for spec in importlib.import_module(f"{package.__name__}.{name}").FIGURES]
        for spec in sorted(own, key=lambda spec: spec.place):
            if spec.name in specs:
                raise ValueError(f"section {section} has a figure {spec.name!r}, which there is already")
            specs[spec.name] = spec
    return specs


FIGURES = found()


class FigureError(DataError):
    """Stored data from which a figure cannot be drawn though all its tables are there: a fault of the figure."""


def figure_spec(name: str) -> FigureSpec:
    """The figure called `name`; raises ValueError with the valid names."""
    if name not in FIGURES:
        raise ValueError(f"unknown figure {name!r}; the figures are {', '.join(FIGURES)}")
    return FIGURES[name]


def of_section(section: str) -> list[str]:
    """The names of its figures."""
    return [name for name, spec in FIGURES.items() if spec.section == section]


def draw(store: Store, machine_name: str, figure_name: str) -> tuple[Figure, pd.DataFrame]:
    """Draw one figure of one machine: the figure and the numbers in it.

    Raises DataError naming the table and the machine when an input is missing or damaged, or has nothing to draw, and
    FigureError when drawing fails: a figure that cannot be drawn ends nothing but itself.
    """
    spec = figure_spec(figure_name)
    tables = {}
    present = [name for name in spec.optional if (store.data / machine_name / f"{name}.csv").exists()]
    for name in (*spec.tables, *present):
        try:
            source, _, table = name.rpartition(".")
            tables[name] = published.numbers(store.root, table) if source else store.read(machine_name, table)
        except (DataError, OSError, ValueError) as error:
            raise DataError(f"figure {figure_name} of {machine_name} needs the table {name}: {error}") from None
    try:
        with style.styled():
            return spec.draw(tables, machine_name)
    except style.NothingToDraw as error:
        raise DataError(f"figure {figure_name} of {machine_name}: {error}") from None
    except Exception as error:
        raise undrawn(figure_name, machine_name, error) from error


def render(store: Store, machine_name: str, figure_name: str) -> dict[str, bytes]:
    """One figure of one machine as svg, pdf, png and csv, not written. Raises as `draw`."""
    figure, data = draw(store, machine_name, figure_name)
    try:
        return style.rendered(figure, data)
    except Exception as error:
        raise undrawn(figure_name, machine_name, error) from error


def write(store: Store, machine_name: str, figure_name: str) -> list[pathlib.Path]:
    """Draw one figure and write figures/<machine>/<name>.{svg,pdf,png,csv}; returns the paths. Raises as `draw`."""
    return style.save(render(store, machine_name, figure_name), store.figures / machine_name, figure_name)


def undrawn(figure_name: str, machine_name: str, error: Exception) -> FigureError:
    """What to raise for an error of any kind; the traceback, for who mends it, goes to stderr."""
    traceback.print_exception(error)
    return FigureError(f"figure {figure_name} of {machine_name} could not be drawn: {type(error).__name__}: {error}")
