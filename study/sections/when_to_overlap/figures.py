"""Figures of section 4: where overlap pays, how well that is predicted, and what it means for models."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from study.drawing import looks, style
from study.drawing.figure import FigureSpec
from study.sections.when_to_overlap.section import testable

COLUMNS = 3
MIN_GRID_POINTS = 9
RATIO_TICKS = (1, 0.5, 2, 0.25, 4, 0.1, 10, 0.7, 1.5, 0.9, 1.1, 3, 0.35, 0.8, 1.25)


def verdict_map(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """Measured verdict over collective size and matmul size; dashed: the border where the prediction equals sequential.

    A panel per method that was measured on a grid of sizes; the few points of the others draw no border, and are shown
    only where there is no grid at all.
    """
    table = style.rows(tables["when_to_overlap"], "row").drop_duplicates(["method", "comm_bytes", "matmul_n"])
    gridded = table.groupby("method")["point_key"].transform("size") >= MIN_GRID_POINTS
    table = table[gridded] if gridded.any() else table
    table = table.reset_index(drop=True)
    table["predicted_speedup"] = table["t_seq_us"] / table["predicted_us"]
    methods = looks.ordered(table["method"])
    lines = -(-len(methods) // COLUMNS)
    columns = -(-len(methods) // lines)
    figure = style.new(style.WIDE_IN if columns > 1 else style.NARROW_IN, 0.45 + 2.1 * lines)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axis in axes[len(methods) :]:
        axis.set_axis_off()
    for axis, method in zip(axes, methods, strict=False):
        points = table[table["method"] == method]
        for name, group in points.groupby("measured_verdict"):
            look = looks.look(name)
            axis.plot(group["matmul_n"], group["comm_bytes"], linestyle="", marker=look.marker, color=look.colour)
        found = border(axis, points)
        ns, sizes = sorted(table["matmul_n"].unique()), sorted(table["comm_bytes"].unique())
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.minorticks_off()
        axis.set_xticks(ns, [str(n) for n in ns], rotation=45)
        step = -(-len(sizes) // 8)
        axis.set_yticks(sizes[::step], [style.size_label(size) for size in sizes[::step]])
        axis.margins(0.1)
        axis.set_title(f"{looks.look(method).label}\n{found}" if found else looks.look(method).label)
    for place, axis in enumerate(axes[: len(methods)]):
        if place % columns == 0:
            axis.set_ylabel("all-reduce size")
        if place + columns >= len(methods):
            axis.set_xlabel("matmul n (n × n × n)")
            axis.tick_params(labelbottom=True)
    handles = [
        Line2D([], [], linestyle="", marker=looks.look(name).marker, color=looks.look(name).colour, label=name)
        for name in ("helps", "hurts", "undecided")
    ]
    handles.append(Line2D([], [], color=looks.BLACK, linestyle=(0, (4, 2)), label="predicted border"))
    figure.legend(handles=handles, loc="outside upper left", ncols=4 if columns > 1 else 2, handlelength=1.6)
    names = ["method", "comm_bytes", "matmul_n", "t_seq_us", "measured_us", "predicted_us", "predicted_speedup",
             "measured_verdict", "verdict", "held_out"]  # fmt: skip
    return figure, table[names]


def border(axis: Axes, points: pd.DataFrame) -> str:
    """Draw the line where the predicted time equals the sequential one; words for a grid that has none."""
    grid = points.pivot(index="comm_bytes", columns="matmul_n", values="predicted_speedup")
    measured = grid.notna().sum(axis="columns")
    grid = grid[measured == measured.max()].dropna(axis="columns")  # published sizes may lie beside the grid
    if min(grid.shape) < 2:
        return ""
    speedup = grid.stack()
    if speedup.min() < 1 < speedup.max():
        flat = Figure().subplots().contour(np.log2(grid.columns), np.log2(grid.index), np.log(grid), levels=[0.0])
        for line in flat.get_paths()[0].to_polygons(closed_only=False):
            axis.plot(2 ** line[:, 0], 2 ** line[:, 1], color=looks.BLACK, linestyle=(0, (4, 2)), linewidth=1)
        return ""
    return f"(predicted {'shorter' if speedup.min() >= 1 else 'longer'} everywhere)"


def prediction(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """Predicted over measured overlapped time; hollow: in the fit, filled: held out; the band is ±10 %."""
    table = style.rows(tables["when_to_overlap"], "row")
    scale, unit = style.time_unit(table["measured_us"].median() * 4)
    methods = looks.ordered(table["method"])
    many = len(methods) > 4
    legend_columns = 2 if many else 1
    figure = style.new(style.WIDE_IN if many else style.NARROW_IN, 2.5 + 0.13 * -(-len(methods) // legend_columns))
    axis = figure.subplots()
    axis.axhspan(0.9, 1.1, color=looks.LIGHT, linewidth=0)
    axis.axhline(1, color=looks.BLACK, linewidth=0.7)
    handles = []
    for method in methods:
        look = looks.look(method)
        for held_out, face in ((False, "white"), (True, look.colour)):
            rows = table[(table["method"] == method) & (table["held_out"] == held_out)]
            middle, low, high = (rows[f"predicted_{end}us"] / rows["measured_us"] for end in ("", "lo_", "hi_"))
            axis.errorbar(rows["measured_us"] / scale, middle, [middle - low, high - middle], linestyle="",
                          marker=look.marker, color=look.colour, markerfacecolor=face, elinewidth=0.4, markersize=3.5,
                          markeredgewidth=0.7)  # fmt: skip
        rows = table[table["method"] == method]
        text, error = f"{look.label}: none held out", rows.loc[rows["held_out"], "error"].abs()
        if not testable(rows["num_training"].iloc[0]):
            text = f"{look.label}: {rows['num_training'].iloc[0]} points fitted, not testable"
        elif len(error):
            text = f"{look.label}: median error {error.median():.1%} of {len(error)} held out"
        handles.append(Line2D([], [], linestyle="", marker=look.marker, color=look.colour, label=text))
    axis.set_xscale("log")
    axis.set_yscale("log", base=2)
    times = table["measured_us"] / scale
    decades = [factor * 10.0**power for factor in (1, 3, 2, 5) for power in range(-4, 7)]
    ticks = style.spaced(decades, times.min(), times.max(), gap=0.12)
    axis.set_xticks(ticks, [style.digits(tick) for tick in ticks])
    ends = [table[f"predicted_{end}_us"] / table["measured_us"] for end in ("lo", "hi")]
    low, high = min(ends[0].min(), 0.88) * 0.98, max(ends[1].max(), 1.12) * 1.02
    axis.set_ylim(low, high)
    ticks = style.spaced(RATIO_TICKS, low, high)
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(f"measured overlapped time ({unit})")
    axis.set_ylabel("predicted / measured")
    figure.legend(handles=handles, loc="outside upper left", handlelength=1, ncols=legend_columns)
    names = ["method", "configuration", "comm_bytes", "matmul_n", "held_out", "measured_us", "predicted_us",
             "predicted_lo_us", "predicted_hi_us", "error"]  # fmt: skip
    return figure, table[names]


def models(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """Communication's share of a layer (above) and the gain from overlapping it (below), per phase and tp.

    Hollow markers are extrapolated; dashed lines are the ideal gain.
    """
    table = style.rows(tables["model_shares"], "row").sort_values("tokens", kind="stable")
    panels = list(table[["phase", "tp"]].drop_duplicates().sort_values(["phase", "tp"]).itertuples(index=False))
    figure = style.new(style.WIDE_IN, 3.6)
    axes = figure.subplots(2, len(panels), squeeze=False, sharey="row", sharex="col")
    names = looks.ordered(table["model"])
    for column, (phase, tp) in enumerate(panels):
        share, gain = axes[:, column]
        cell = table[(table["phase"] == phase) & (table["tp"] == tp)]
        for name in names:
            look, line = looks.look(name), cell[cell["model"] == name]
            share.plot(line["tokens"], 100 * line["comm_share"], color=look.colour)
            gain.plot(line["tokens"], line["gain"], color=look.colour)
            gain.fill_between(
                line["tokens"], line["gain_lo"], line["gain_hi"], color=look.colour, alpha=0.12, linewidth=0
            )
            gain.plot(line["tokens"], line["ideal_gain"], color=look.colour, linestyle=(0, (3, 2)), linewidth=0.7)
            for axis, values in ((share, 100 * line["comm_share"]), (gain, line["gain"])):
                for extrapolated in (False, True):
                    chosen = line["extrapolated"] == extrapolated
                    axis.plot(line["tokens"][chosen], values[chosen], linestyle="", marker=look.marker, markersize=3,
                              color=look.colour, markerfacecolor="white" if extrapolated else look.colour)  # fmt: skip
        gain.axhline(1, color=looks.BLACK, linewidth=0.6)
        tokens = sorted(cell["tokens"].unique())
        gain.set_xscale("log", base=2)
        gain.set_xticks(tokens[:: -(-len(tokens) // 5)], [f"{t}" if t < 1024 else f"{t // 1024}k" for t in
                                                          tokens[:: -(-len(tokens) // 5)]])  # fmt: skip
        gain.minorticks_off()
        share.set_title(f"{phase}, TP {tp}")
        gain.set_xlabel("batch" if phase == "decode" else "tokens")
        for axis in (share, gain):
            axis.grid(color=looks.LIGHT, linewidth=0.4)
            axis.set_axisbelow(True)
    axes[0, 0].set_ylabel("communication share\nof a layer (%)")
    axes[0, 0].set_ylim(0, 100)
    axes[1, 0].set_ylabel("gain (×)\nsolid: predicted, dashed: ideal")
    handles = [
        Line2D([], [], color=looks.look(name).colour, marker=looks.look(name).marker, label=looks.look(name).label)
        for name in names
    ]
    handles.append(Line2D([], [], color=looks.GREY, marker="o", markerfacecolor="white", label="extrapolated"))
    figure.legend(handles=handles, loc="outside upper left", ncols=4)
    columns = ["model", "phase", "tp", "batch", "tokens", "comm_share", "gain", "gain_lo", "gain_hi", "ideal_gain",
               "extrapolated"]  # fmt: skip
    return figure, table[columns]


FIGURES = (
    FigureSpec(
        "when_map", "when_to_overlap", ("when_to_overlap",),
        "Where overlap helps, hurts, or is undecided, per method measured on the whole grid, and the border that "
        "the model predicts.",
        verdict_map,
    ),
    FigureSpec(
        "when_prediction", "when_to_overlap", ("when_to_overlap",),
        "Predicted over measured overlapped time with the interval of the prediction; filled: held out of the fit.",
        prediction,
    ),
    FigureSpec(
        "when_models", "when_to_overlap", ("model_shares",),
        "Share of communication in a layer, and the predicted and ideal gain from overlapping it, per model.",
        models,
    ),
)  # fmt: skip
