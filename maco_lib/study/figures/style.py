"""How every figure looks and is written: one table of colours and markers, two widths, equal bytes for equal data."""

import contextlib
import dataclasses
import functools
import io
import math
import pathlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import matplotlib
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from maco_lib.study.files import write_atomically

NARROW_IN, WIDE_IN = 3.3, 6.9  # one and two columns of a paper
FORMATS = ("svg", "pdf", "png", "csv")

# Okabe and Ito's palette: told apart with every common colour blindness.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C"
LIGHT = "#D9D9D9"


# Those of `comm.mailed` are push above so many bytes (that module imports torch, this one must not): what they are
# called as a whole, and up to there.
PUSH_ABOVE = {"maco_ll": 2**18, "maco_ll128": 2**22}
ABOVE = "maco_push_128"
LINES_THEN_PUSH, IN_LINES = "lines to 256 KiB, then push", "one-shot in lines"
LONG_THEN_PUSH, IN_LONG_LINES = "lines of 128 B to 4 MiB, then push", "lines of 128 B"


class NothingToDraw(ValueError):
    """The tables are there but hold no row that this figure shows; the message says which rows."""


def rows(table: pd.DataFrame, what: str) -> pd.DataFrame:
    """`table` with a fresh index; raises NothingToDraw naming `what` when it is empty."""
    if table.empty:
        raise NothingToDraw(f"no {what}")
    return table.reset_index(drop=True)


@dataclass(frozen=True)
class Look:
    """The fixed appearance of one method, backend or arm."""

    label: str
    colour: str
    marker: str


LOOKS: dict[str, Look] = {
    # overlap methods
    "sequential": Look("sequential", BLACK, "s"),
    "sequential_unsynchronised": Look("sequential, no host wait", GREY, "s"),
    "two_stream": Look("two streams", BLUE, "o"),
    "two_stream_matmul_first": Look("two streams, matmul first", BLUE, "<"),
    "two_stream_priority": Look("two streams, priority", SKY, "^"),
    "two_stream_cta": Look("two streams, {n} CTAs", PURPLE, "P"),
    "nccl_symmetric_stream": Look("NCCL symmetric on a stream", SKY, "d"),
    "two_shot_stream": Look("two-shot on a stream", GREEN, "v"),
    "vllm_custom_stream": Look("vLLM's kernels on a stream", GREY, "p"),
    "maco_pull_8_stream": Look("pull, 8 CTAs, on a stream", GREEN, "P"),
    "maco_pull_8_left": Look("pull, 8 CTAs, SMs reserved", GREEN, ">"),
    "maco_push_64_stream": Look("push, 64 CTAs, on a stream", VERMILLION, "X"),
    "maco_push_128_stream": Look("push, 128 CTAs, on a stream", VERMILLION, "D"),
    "maco_staged_8_stream": Look("staged, 8 CTAs, on a stream", PURPLE, "s"),
    "maco_staged_12_stream": Look("staged, 12 CTAs, on a stream", PURPLE, "h"),
    "maco_staged_12_left": Look("staged, 12 CTAs, SMs reserved", PURPLE, ">"),
    "copy_engine_stream": Look("copy engine on a stream", ORANGE, "X"),
    "auto": Look("planner", VERMILLION, "*"),
    "auto_untuned": Look("planner, untuned", ORANGE, "*"),
    # matmul + all-reduce
    "sequential_gloo": Look("sequential, gloo", ORANGE, "s"),
    "sequential_nccl": Look("sequential, NCCL", BLUE, "s"),
    "sequential_nccl_two_kernels": Look("sequential, NCCL, norm in two kernels", BLUE, "D"),
    "sequential_nccl_symmetric": Look("sequential, NCCL symmetric", SKY, "d"),
    "sequential_one_shot": Look("sequential, symmetric one-shot", VERMILLION, ">"),
    "sequential_two_shot": Look("sequential, symmetric two-shot", GREEN, "<"),
    "sequential_vllm_custom": Look("sequential, kernels of vLLM", GREY, "H"),
    "sequential_maco_ll": Look(f"sequential, {LINES_THEN_PUSH}", PURPLE, "*"),
    "sequential_maco_ll128": Look(f"sequential, {LONG_THEN_PUSH}", BLUE, "*"),
    "sequential_maco_one_shot_64": Look("sequential, one-shot, 64 CTAs", ORANGE, ">"),
    "sequential_maco_push_64": Look("sequential, push, 64 CTAs", VERMILLION, "X"),
    "sequential_maco_push_128": Look("sequential, push, 128 CTAs", VERMILLION, "D"),
    "sequential_fastest": Look("sequential, fastest other all-reduce", BLACK, "D"),
    "chunked_nccl": Look("chunked, NCCL", SKY, "p"),
    **{f"chunked{n}_nccl": Look(f"{n} chunks, NCCL", SKY, marker) for n, marker in ((2, "2"), (4, "4"))},
    "async_tp": Look("torch async-TP", GREY, "v"),
    "chunked": Look("chunked", GREEN, "^"),
    **{
        f"chunked{n}_{backend}": Look(f"{n} chunks, {label}", colour, marker)
        for backend, label, colour in (
            ("gloo", "gloo", ORANGE),
            ("maco_staged_8", "staged, 8 CTAs", PURPLE),
            ("maco_push_64", "push, 64 CTAs", GREEN),
        )
        for n, marker in ((2, "2"), (4, "4"), (8, "8"))
    },
    "signalled": Look("signalled", ORANGE, "o"),
    "persistent": Look("persistent kernel", PURPLE, "P"),
    "decode": Look("decode kernels", PURPLE, "v"),
    "fused_norm": Look("fused with residual and norm", PURPLE, "h"),
    # communication backends
    "nccl": Look("NCCL", BLUE, "D"),
    "nccl_cta": Look("NCCL, {n} CTAs", PURPLE, "p"),
    "nccl_symmetric": Look("NCCL, symmetric buffers", SKY, "D"),
    "gloo": Look("gloo", ORANGE, "D"),
    "symm_mem_one_shot": Look("symmetric one-shot", VERMILLION, ">"),
    "symm_mem_two_shot": Look("symmetric two-shot", GREEN, "<"),
    "maco_ll": Look(LINES_THEN_PUSH, PURPLE, "*"),
    "maco_ll128": Look(LONG_THEN_PUSH, BLUE, "*"),
    "maco_one_shot_64": Look("one-shot, 64 CTAs", ORANGE, ">"),
    "maco_pull_8": Look("pull, 8 CTAs", GREEN, "P"),
    "maco_push_64": Look("push, 64 CTAs", VERMILLION, "X"),
    "maco_push_128": Look("push, 128 CTAs", VERMILLION, "D"),
    "maco_staged_8": Look("staged, 8 CTAs", PURPLE, "s"),
    "maco_staged_12": Look("staged, 12 CTAs", PURPLE, "h"),
    "copy_engine": Look("copy engine", ORANGE, "x"),
    "vllm_custom": Look("kernels of vLLM", GREY, "H"),
    # inference arms
    "transformers_eager": Look("transformers eager", BLACK, "h"),
    "transformers_compiled": Look("transformers compiled", ORANGE, "d"),
    "vllm_eager": Look("vLLM eager", SKY, "H"),
    "vllm": Look("vLLM", BLUE, "*"),
    # models
    "Qwen3-0.6B-Base": Look("Qwen3-0.6B", SKY, "v"),
    "Qwen3-8B": Look("Qwen3-8B", BLUE, "8"),
    "Qwen3-32B": Look("Qwen3-32B", BLACK, "d"),
    # verdicts
    "helps": Look("helps", GREEN, "P"),
    "hurts": Look("hurts", VERMILLION, "X"),
    "undecided": Look("undecided", GREY, "o"),
}
CTA_MARKERS = {1: "1", 2: "2", 4: "P", 8: "X", 16: "p", 24: "d", 32: "h"}


def look(name: str) -> Look:
    """The appearance of `name`, the same in every figure; `..._cta<N>` differs in its marker by N.

    Raises ValueError with the valid names for one that is not in the table.
    """
    if name in LOOKS:
        return LOOKS[name]
    family = re.fullmatch(r"(\w+_cta)(\d+)", name)
    if family and family[1] in LOOKS:
        base, count = LOOKS[family[1]], int(family[2])
        return Look(base.label.format(n=count), base.colour, CTA_MARKERS.get(count, base.marker))
    raise ValueError(f"no colour and marker for {name!r} in maco_lib/study/figures/style.py; it has {', '.join(LOOKS)}")


def label_at(name: str, num_bytes: float) -> str:
    """The label of `name` where it sums `num_bytes`: in lines or by push, not both."""
    for lines, most in PUSH_ABOVE.items():
        if name.endswith(lines) and num_bytes > most:
            name = name.removesuffix(lines) + ABOVE
    return look(name).label.replace(LINES_THEN_PUSH, IN_LINES).replace(LONG_THEN_PUSH, IN_LONG_LINES)


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


def save(figure: Figure, data: pd.DataFrame, folder: pathlib.Path, name: str) -> list[pathlib.Path]:
    """Write `folder/name`.{svg,pdf,png,csv}, each complete or not at all; equal data gives equal bytes.

    `data` holds the numbers drawn. Returns the four paths.
    """
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
    paths = [folder / f"{name}.{kind}" for kind in FORMATS]
    for path, kind in zip(paths, FORMATS, strict=True):
        write_atomically(path, contents[kind])
    return paths


def ordered(names: Iterable[str]) -> list[str]:
    """The names once each, in the order of LOOKS, CTA variants by their number."""
    families = list(LOOKS)

    def place(name: str) -> tuple[int, int]:
        look(name)
        count = re.search(r"_cta(\d+)$", name)
        return families.index(re.sub(r"_cta\d+$", "_cta", name)), int(count[1]) if count else 0

    return sorted(set(names), key=place)


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
        shape = look(name)
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
