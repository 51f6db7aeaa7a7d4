"""How every figure looks and is written: two widths, one set of fonts and lines, equal bytes for equal data."""

import contextlib
import dataclasses
import functools
import io
import math
import pathlib
from collections.abc import Iterable, Iterator

import matplotlib
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from study.drawing import looks
from study.harness.files import write_atomically

NARROW_IN, WIDE_IN = 3.3, 6.9  # one and two columns of a paper
FORMATS = ("svg", "pdf", "png", "csv")


class NothingToDraw(ValueError):
    """The tables are there but hold no row that this figure shows; the message says which rows."""


def rows(table: pd.DataFrame, what: str) -> pd.DataFrame:
    """`table` with a fresh index; raises NothingToDraw naming `what` when it is empty."""
    if table.empty:
        raise NothingToDraw(f"no {what}")
    return table.reset_index(drop=True)


FONT = "DejaVu Sans of matplotlib"
RC = {
    "font.family": FONT,
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 4,
    "axes.unicode_minus": True,
    "text.parse_math": False,  # a dollar in the name of a layer, model or machine is a dollar
    "figure.constrained_layout.use": True,
    "figure.dpi": 200,
    "savefig.dpi": 200,
    "svg.hashsalt": "maco",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "pdf.compression": 0,  # zlib differs between builds of Python, and the bytes with it
}


@functools.cache
def add_fonts() -> None:
    """Make matplotlib's own fonts known as `FONT`: a system's build of "DejaVu Sans" draws other bytes."""
    for name in ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"):
        font = FT2Font(pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"))
        entry = dataclasses.replace(font_manager.ttfFontProperty(font), name=FONT)
        font_manager.fontManager.ttflist.append(entry)


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw and save inside this: matplotlib's defaults with our settings, whatever the user's matplotlibrc says."""
    add_fonts()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield


def new(width_in: float, height_in: float) -> Figure:
    """An empty figure of the printed size in inches (no pyplot: nothing global, nothing to close)."""
    return Figure(figsize=(width_in, height_in))


def rendered(figure: Figure, data: pd.DataFrame) -> dict[str, bytes]:
    """The figure and the numbers drawn, by format of FORMATS; equal data gives equal bytes."""
    metadata = {
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        "png": {"Software": None},
    }
    contents = {}
    with styled():
        for kind, facts in metadata.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, metadata=facts)
            contents[kind] = buffer.getvalue()
    contents["csv"] = data.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()
    return contents


def save(contents: dict[str, bytes], folder: pathlib.Path, name: str) -> list[pathlib.Path]:
    """Write `folder/name`.{svg,pdf,png,csv}, each complete or not at all; returns the four paths."""
    paths = [folder / f"{name}.{kind}" for kind in FORMATS]
    for path, kind in zip(paths, FORMATS, strict=True):
        write_atomically(path, contents[kind])
    return paths


def digits(value: float) -> str:
    """Three digits without an exponent: 62.14 -> "62.1", 1006 -> "1006"."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def time_unit(largest_us: float) -> tuple[float, str]:
    """The unit for an axis up to `largest_us` microseconds: (microseconds per unit, its name)."""
    for unit, scale in (("s", 1e6), ("ms", 1e3)):
        if largest_us >= 2 * scale:
            return scale, unit
    return 1.0, "µs"


def size_label(num_bytes: float) -> str:
    """8388608 -> "8 MiB"."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def byte_axis(axis: Axes, sizes: list[float], most: int = 6) -> None:
    """A base-2 logarithmic x axis in bytes, with at most `most` labelled sizes out of those measured."""
    sizes = sorted(set(sizes))
    step = -(-len(sizes) // most)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes[::step], [size_label(size) for size in sizes[::step]])
    axis.minorticks_off()


def apart(wanted: list[float], gap: float) -> list[float]:
    """Places in 0 to 1 near the ascending `wanted` ones, at least `gap` from each other."""
    places: list[float] = []
    for place in wanted:
        places.append(max(place, places[-1] + gap) if places else max(place, 0.0))
    upper = 1.0
    for index in range(len(places) - 1, -1, -1):
        places[index] = min(places[index], upper)
        upper = places[index] - gap
    return places


def label_ends(axis: Axes, ends: list[tuple[float, float, str, str]], gap_pt: float = 7.5) -> None:
    """Write the labels of lines, `(x, y, text, colour)`, at the right edge, moved apart so that none covers another.

    Call it last, with the limits of the axes settled.
    """
    if not ends:
        return
    height_pt = axis.get_position().height * axis.figure.get_size_inches()[1] * 72
    to_axes = axis.transScale + axis.transLimits
    wanted = sorted(((to_axes.transform((x, y))[1], text, colour) for x, y, text, colour in ends))
    for place, (_, text, colour) in zip(apart([end[0] for end in wanted], gap_pt / height_pt), wanted, strict=True):
        axis.annotate(
            text, (1, place), xycoords="axes fraction", xytext=(4, 0), textcoords="offset points",
            color=colour, va="center", ha="left", fontsize=6.5, annotation_clip=False,
        )  # fmt: skip


def label_line_ends(axis: Axes, ends: dict[str, tuple[float, float]], gap_pt: float = 7.5) -> None:
    """As `label_ends` for methods or backends by the (x, y) of their last points: marker, label and a thin line there.

    Call it last, with the layout drawn once.
    """
    height_pt = axis.get_window_extent().height / axis.figure.dpi * 72
    to_axes = axis.transScale + axis.transLimits
    wanted = sorted((*to_axes.transform(end)[::-1], name) for name, end in ends.items())
    for place, (y, x, name) in zip(apart([end[0] for end in wanted], gap_pt / height_pt), wanted, strict=True):
        shape = looks.look(name)
        axis.plot([x, 1.04], [y, place], transform=axis.transAxes, color=shape.colour, linewidth=0.4, clip_on=False)
        axis.plot(1.06, place, transform=axis.transAxes, color=shape.colour, marker=shape.marker, markersize=3,
                  clip_on=False)  # fmt: skip
        axis.annotate(
            shape.label, (1.06, place), xycoords="axes fraction", xytext=(4, 0), textcoords="offset points",
            color=shape.colour, va="center", ha="left", fontsize=6, annotation_clip=False,
        )  # fmt: skip


def spaced(candidates: Iterable[float], low: float, high: float, gap: float = 0.055) -> list[float]:
    """Those of `candidates`, the more important ones first, that fit on a logarithmic axis from `low` to `high`.

    No two come closer than `gap` of the axis.
    """
    least, chosen = gap * math.log(high / low), []
    for value in candidates:
        if low <= value <= high and all(abs(math.log(value / other)) >= least for other in chosen):
            chosen.append(value)
    return sorted(chosen)


def plain_log_ticks(axis: Axis, subs: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """Labels 1, 2, 5, 10, ... (or the multiples `subs` of the powers of ten) on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.set_minor_locator(NullLocator())
