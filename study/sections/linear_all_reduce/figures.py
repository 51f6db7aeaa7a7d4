"""Figures of section 5: matmul + all-reduce by every technique, over the rows M, a panel per layer."""

from collections.abc import Callable, Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from study.drawing import looks, style, timeline
from study.drawing.figure import FigureSpec
from study.published.criteria import LINEAR_MANY_ROWS, LINEAR_TARGETS
from study.sections.linear_all_reduce.methods import BASE, CHAIN, LAYERS, MATMUL

COLUMNS = 3
EDGE = 0.05
# Several methods of one kind are one line, the fastest at each point.
OTHER_SEQUENTIAL, CHUNKED_NCCL, CHUNKED = "sequential_fastest", "chunked_nccl", "chunked"


def family(method: str) -> str:
    """The line that a method of matmul + all-reduce belongs to."""
    if method in BASE.values():
        return method
    if method.startswith("sequential_"):
        return OTHER_SEQUENTIAL
    if method.startswith("chunked"):
        return CHUNKED_NCCL if method.endswith("_nccl") else CHUNKED
    return method


def finished(table: pd.DataFrame, operation: str) -> pd.DataFrame:
    """Rows with a time, in the order of the layers."""
    rows = table[(table["operation"] == operation) & table["time_us"].notna()]
    rows = style.rows(rows, f"finished row of {operation}")
    place = {layer: number for number, layer in enumerate(LAYERS)}
    return rows.assign(place=rows["layer"].map(place)).sort_values(["place", "m"], kind="stable").drop(columns="place")


def fastest_of_families(table: pd.DataFrame) -> pd.DataFrame:
    rows = finished(table[table["method"] != "auto_untuned"], MATMUL)
    rows = rows.assign(line=rows["method"].map(family)).sort_values("time_us", kind="stable")
    return rows.drop_duplicates(["layer", "m", "line"]).sort_index()


def with_interval(rows: pd.DataFrame, name: str, numerator: str) -> pd.DataFrame:
    """Columns value, low, high of a ratio `name` = `numerator` / time, with the interval of the time."""
    ends = {"value": "", "low": "_hi", "high": "_lo"}
    return rows.assign(**{end: rows[numerator] / rows[f"time{part}_us"] for end, part in ends.items()})


def fraction(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """Fraction of ideal over M. Dashed: what is to be reached from LINEAR_MANY_ROWS rows on, on so many GPUs."""
    rows = with_interval(fastest_of_families(tables["linear_all_reduce"]), "fraction", "ideal_us")
    ranks = int(rows["tp"].iloc[0])
    wanted = LINEAR_TARGETS.get(ranks) if not rows["t_comm_backend"].eq("gloo").all() else None

    def dress(axis: Axes) -> None:
        axis.axhline(1, color=looks.BLACK, linewidth=0.8)
        if wanted:
            axis.plot([LINEAR_MANY_ROWS, rows["m"].max()], [wanted] * 2, color=looks.BLACK, linestyle=(0, (4, 2)),
                      linewidth=0.8)  # fmt: skip
        axis.set_ylim(max(0.0, rows["low"].min() - EDGE), max(1.0, rows["value"].max()) + EDGE)

    return panels(rows, "fraction of ideal", dress), numbers(rows, "fraction_of_ideal")


def speedup(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """Speedup over sequential code with the default all-reduce, over M."""
    rows = with_interval(fastest_of_families(tables["linear_all_reduce"]), "speedup", "t_base_us")
    rows = style.rows(rows[~rows["method"].isin(BASE.values())], "method other than the sequential one")

    def dress(axis: Axes) -> None:
        axis.axhline(1, color=looks.BLACK, linewidth=0.8)

    base = looks.look(BASE["cpu" if rows["t_comm_backend"].eq("gloo").all() else "cuda"]).label
    return panels(rows, f"speedup over {base}", dress), numbers(rows, "speedup")


def chain(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """Latency of matmul + all-reduce + residual + RMSNorm at few rows."""
    rows = finished(tables["linear_all_reduce"], CHAIN)
    rows = rows.assign(line=rows["method"], value=rows["time_us"], low=rows["time_lo_us"], high=rows["time_hi_us"])

    def dress(axis: Axes) -> None:
        alone = rows[rows["layer"] == axis.get_title()].drop_duplicates("m")
        axis.plot(alone["m"], alone["t_matmul_us"], color=looks.BLACK, linestyle=(0, (4, 2)), linewidth=0.8)
        axis.set_yscale("log")
        style.plain_log_ticks(axis.yaxis)

    return panels(rows, "time (µs); dashed: matmul alone", dress), numbers(rows, "ect_us")


def panels(rows: pd.DataFrame, label: str, dress: Callable[[Axes], None]) -> Figure:
    """A panel per layer, a line of `value` with its interval per `line`, over M."""
    layers, lines = list(dict.fromkeys(rows["layer"])), looks.ordered(rows["line"])
    columns = min(COLUMNS, len(layers))
    # o_proj above down_proj: the layers of a model are a column.
    layers = sorted(layers, key=lambda layer: layer.split()[-1], reverse=True) if len(layers) > COLUMNS else layers
    height = -(-len(layers) // columns)
    figure = style.new(style.WIDE_IN, 0.75 + 1.75 * height)
    axes = figure.subplots(height, columns, squeeze=False, sharex=True, sharey="row").flat
    ticks = sorted(rows["m"].unique())
    for axis, layer in zip(axes, layers, strict=False):
        axis.set_title(layer)
        for name in lines:
            look = looks.look(name)
            line = rows[(rows["layer"] == layer) & (rows["line"] == name)].sort_values("m")
            # The planner follows one of the others: marks that leave it to be seen.
            marks = {"linestyle": "", "markersize": 6, "fillstyle": "none", "zorder": 3} if name == "auto" else {}
            axis.plot(line["m"], line["value"], color=look.colour, marker=look.marker, **{"markersize": 3, **marks})
            if name != "auto":
                axis.fill_between(line["m"], line["low"], line["high"], color=look.colour, alpha=0.2, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks[:: -(-len(ticks) // 6)], [str(tick) for tick in ticks[:: -(-len(ticks) // 6)]])
        axis.minorticks_off()
        axis.grid(color=looks.LIGHT, linewidth=0.4)
        axis.set_axisbelow(True)
        dress(axis)
    for axis in list(axes)[len(layers) :]:
        axis.set_axis_off()
    figure.supxlabel("rows M", fontsize=7)
    figure.supylabel(label, fontsize=7)
    handles = [Line2D([], [], color=looks.look(name).colour, marker=looks.look(name).marker,
                      label=looks.look(name).label, linestyle="" if name == "auto" else "-",
                      fillstyle="none" if name == "auto" else "full") for name in lines]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper left", ncols=4, handlelength=1.5, columnspacing=1.2)
    return figure


def numbers(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    names = ["layer", "m", "n", "k", "tp", "line", "method", "time_us", "t_matmul_us", "t_comm_us", "ideal_us"]
    return rows[[*dict.fromkeys([*names, column]), "value", "low", "high"]].reset_index(drop=True)


FIGURES = (
    FigureSpec(
        "linear_fraction", "linear_all_reduce", ("linear_all_reduce",),
        "Matmul + all-reduce: max(T_matmul, best T_comm) over the time, the fastest method of each kind, with the "
        "95 % interval of the time. Dashed: the fraction to be reached at many rows.",
        fraction,
    ),
    FigureSpec(
        "linear_speedup", "linear_all_reduce", ("linear_all_reduce",),
        "Matmul + all-reduce: speedup over the matmul and then the default all-reduce, the fastest method of each "
        "kind.",
        speedup,
    ),
    FigureSpec(
        "linear_chain", "linear_all_reduce", ("linear_all_reduce",),
        "Matmul + all-reduce + residual + RMSNorm at few rows: time of one run, the weights not in the cache.",
        chain,
    ),
    FigureSpec(
        "linear_timeline", "linear_all_reduce", ("linear_timeline",),
        "Matmul + all-reduce: profiler lanes of rank 0 on a common time axis, technique above technique.",
        timeline.linear,
    ),
)  # fmt: skip
