"""Figures of section 1: what overlapping an all-reduce with a matmul gives."""

from collections.abc import Mapping

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from study.drawing import looks, style, timeline
from study.drawing.figure import FigureSpec

PROTOCOL_LABELS = {"published": "published protocol", "device": "device protocol"}


def published_configurations(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """Time of each method per published configuration (columns) and protocol (rows), the ideal as a dashed line."""
    published = tables["published.overlap"].set_index("configuration")
    table = tables["overlap"]
    table = style.rows(table[table["configuration"].isin(published.index)], "row of a published configuration")
    names = [name for name in published.index if name in set(table["configuration"])]
    protocols = [name for name in PROTOCOL_LABELS if name in set(table["protocol"])]
    methods = {name: looks.ordered(table.loc[table["protocol"] == name, "method"]) for name in protocols}
    heights = [max(len(methods[name]) + 1.6, 5.0) for name in protocols]
    figure = style.new(style.WIDE_IN, 0.75 + 0.19 * sum(heights))
    axes = figure.subplots(
        len(protocols), len(names), squeeze=False, sharey="row", gridspec_kw={"height_ratios": heights}
    )
    for row, protocol in enumerate(protocols):
        order = methods[protocol]
        for column, name in enumerate(names):
            axis = axes[row, column]
            cell = table[(table["configuration"] == name) & (table["protocol"] == protocol)].set_index(
                "method", drop=False
            )
            scale, unit = style.time_unit(cell[["t_overlap_us", "t_seq_us"]].max().max())
            for place, method in enumerate(order):
                if method in cell.index:
                    draw_time(axis, place, cell.loc[method], looks.look(method), scale)
            ideal = cell["ideal_us"].median() / scale
            axis.axvline(ideal, color=looks.BLACK, linestyle=(0, (4, 2)), linewidth=0.8)
            axis.annotate("ideal", (ideal, 1), xycoords=("data", "axes fraction"), xytext=(2, -1),
                          textcoords="offset points", va="top", fontsize=6)  # fmt: skip
            longest = cell[["t_overlap_hi_us", "t_overlap_us", "t_seq_us"]].max().max() / scale
            axis.set_xlim(0, longest * 1.9)
            axis.set_ylim(len(order) - 0.4, -1.2)
            axis.set_yticks(range(len(order)), [looks.look(method).label for method in order])
            axis.grid(axis="x", color=looks.LIGHT, linewidth=0.4)
            axis.set_axisbelow(True)
            axis.set_xlabel(f"time ({unit})")
            if row == 0:
                what = published.loc[name]
                size = f"{style.size_label(cell['comm_bytes'].iloc[0])}, n = {cell['matmul_n'].iloc[0]}"
                axis.set_title(f"{name.replace(', ', ',' + chr(10))}\n{size}\npublished: {what['speedup']:.2f}×")
        axes[row, 0].set_ylabel(PROTOCOL_LABELS[protocol])
    columns = ["configuration", "comm_bytes", "matmul_n", "protocol", "method", "t_seq_us", "t_overlap_us",
               "t_overlap_lo_us", "t_overlap_hi_us", "ideal_us", "speedup"]  # fmt: skip
    return figure, table[columns]


def draw_time(axis, place: int, row: pd.Series, look: looks.Look, scale: float) -> None:
    """One method's time with its interval, its speedup written beside it; "failed" where the arm failed."""
    if np.isnan(row["t_overlap_us"]):
        axis.annotate("failed", (0.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=6)
        return
    middle, low, high = (row[name] / scale for name in ("t_overlap_us", "t_overlap_lo_us", "t_overlap_hi_us"))
    axis.plot([low, high], [place, place], color=look.colour, linewidth=1.6, solid_capstyle="butt")
    axis.plot(middle, place, color=look.colour, marker=look.marker, markersize=4)
    text = style.digits(middle) if row["method"] == "sequential" else f"{style.digits(middle)}, {row['speedup']:.2f}×"
    axis.annotate(text, (high, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=6)


def synchronisation(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """Relative time of sequential with and without the host's wait and of two streams, in the published protocol."""
    published = tables["published.overlap"]
    table = tables["overlap"]
    table = table[(table["protocol"] == "published") & table["configuration"].isin(published["configuration"])]
    steps = ("sequential", "sequential_unsynchronised", "two_stream")
    wide = table.set_index(["configuration", "method"])
    numbers = []
    for name in published["configuration"]:
        if not all((name, step) in wide.index for step in steps):
            continue
        waiting, free, overlapped = (wide.loc[(name, step)] for step in steps)
        base = waiting["t_overlap_us"]
        numbers.append({
            "configuration": name,
            **{f"{step}{part}": wide.loc[(name, step), f"t_overlap{part}_us"] / base
               for step in steps for part in ("", "_lo", "_hi")},
            "ideal": waiting["ideal_us"] / base,
            "sequential_us": base, "sequential_unsynchronised_us": free["t_overlap_us"],
            "two_stream_us": overlapped["t_overlap_us"],
            "speedup": base / overlapped["t_overlap_us"],
            "speedup_of_removed_wait": base / free["t_overlap_us"],
            "speedup_of_overlap": free["t_overlap_us"] / overlapped["t_overlap_us"],
        })  # fmt: skip
    data = style.rows(pd.DataFrame(numbers), f"published configuration with all of {', '.join(steps)}")
    figure = style.new(style.WIDE_IN, 0.75 + 0.52 * len(data))
    axis = figure.subplots()
    for place, row in data.iterrows():
        axis.plot([row["sequential"], row["sequential_unsynchronised"]], [place - 0.09] * 2, color=looks.GREY,
                  linewidth=5, alpha=0.45, solid_capstyle="butt")  # fmt: skip
        axis.plot([row["sequential_unsynchronised"], row["two_stream"]], [place + 0.09] * 2, color=looks.BLUE,
                  linewidth=5, alpha=0.45, solid_capstyle="butt")  # fmt: skip
        for step, offset in zip(steps, (-0.09, 0, 0.09), strict=True):
            look = looks.look(step)
            axis.plot([row[f"{step}_lo"], row[f"{step}_hi"]], [place + offset] * 2, color=look.colour, linewidth=1.2)
            axis.plot(row[step], place + offset, color=look.colour, marker=look.marker, markersize=4.5)
        axis.plot([row["ideal"]] * 2, [place - 0.3, place + 0.3], color=looks.BLACK, linestyle=(0, (2, 1)))
        axis.annotate(
            f"{row['speedup']:.2f}× = {row['speedup_of_removed_wait']:.2f}× (wait removed)"
            f" · {row['speedup_of_overlap']:.2f}× (overlap)",
            (1.015, place), xycoords=("axes fraction", "data"), va="center", annotation_clip=False,
        )  # fmt: skip
    axis.set_yticks(range(len(data)), [name.replace(", ", ",\n") for name in data["configuration"]])
    axis.set_ylim(len(data) - 0.5, -0.5)
    low = min(data["ideal"].min(), data[[f"{step}_lo" for step in steps]].min().min())
    high = data[[f"{step}_hi" for step in steps]].max().max()
    axis.set_xlim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axis.set_xlabel("time relative to the published sequential arm (host clock)")
    axis.grid(axis="x", color=looks.LIGHT, linewidth=0.4)
    axis.set_axisbelow(True)
    handles = [
        matplotlib.lines.Line2D([], [], color=looks.look(step).colour, marker=looks.look(step).marker, linestyle="")
        for step in steps
    ]
    handles.append(matplotlib.lines.Line2D([], [], color=looks.BLACK, linestyle=(0, (2, 1))))
    labels = ["sequential, host waits between", "sequential, no host wait", "two streams", "ideal"]
    figure.legend(handles, labels, loc="outside upper left", ncols=4, handlelength=1.2, columnspacing=1.5)
    return figure, data


def heatmap(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """Ideal speedup, measured speedup and fraction of ideal over collective size and matmul size, device protocol.

    The first row shows two streams, the published technique; a second one the fastest method of each cell, where the
    sweep has others.
    """
    table = tables["overlap"].dropna(subset=["speedup"])
    table = table[(table["configuration"] == "sweep") & (table["method"] != "sequential")]
    table = table.assign(ideal_speedup=table["t_seq_us"] / table["ideal_us"])
    cell = ["comm_bytes", "matmul_n"]
    plain = style.rows(table[table["method"] == "two_stream"], "finished two_stream in the sweep").drop_duplicates(cell)
    fastest = table.sort_values("speedup", ascending=False, kind="stable").drop_duplicates(cell).sort_values(cell)
    rows = [("two streams", plain)]
    if (fastest["method"] != "two_stream").any():
        rows.append(("fastest method", fastest))
    grid = pd.concat([frame.assign(shown=label) for label, frame in rows], ignore_index=True)
    num_rows, num_columns = grid["comm_bytes"].nunique(), grid["matmul_n"].nunique()
    figure = style.new(style.WIDE_IN, 0.3 + len(rows) * (0.55 + 0.17 * num_rows))
    panels = {"ideal_speedup": "ideal speedup", "speedup": "speedup", "fraction_of_ideal": "fraction of ideal"}
    axes = figure.subplots(len(rows), 3, squeeze=False)
    top = max(grid["ideal_speedup"].max(), grid["speedup"].max(), 1.1)
    speedups = matplotlib.colors.TwoSlopeNorm(1.0, vmin=min(2 - top, grid["speedup"].min(), 0.9), vmax=top)
    for row, (label, frame) in enumerate(rows):
        for axis, (value, title) in zip(axes[row], panels.items(), strict=True):
            cells = frame.pivot(index="comm_bytes", columns="matmul_n", values=value).sort_index(ascending=False)
            fraction = value == "fraction_of_ideal"
            colours = {"cmap": "viridis", "vmin": 0, "vmax": 1} if fraction else {"cmap": "RdBu", "norm": speedups}
            sns.heatmap(
                cells, ax=axis, annot=num_columns <= 9, fmt=".2f", cbar=False, linewidths=0.3,
                annot_kws={"size": 5.5 if num_columns > 6 else 6.5}, **colours,
            )  # fmt: skip
            axis.set_yticks(axis.get_yticks(), [style.size_label(size) for size in cells.index], rotation=0)
            axis.set_xticks(axis.get_xticks(), list(cells.columns), rotation=45 if num_columns > 5 else 0)
            axis.tick_params(length=0)
            axis.set_xlabel("matmul n (n × n × n)" if row == len(rows) - 1 else "")
            axis.set_ylabel("all-reduce size" if axis is axes[row, 0] else "")
            if axis is not axes[row, 0]:
                axis.set_yticklabels([])
            axis.set_title(title if value == "ideal_speedup" else f"{title}, {label}")
    return figure, grid[["shown", *cell, "method", "t_seq_us", "t_overlap_us", "ideal_us", *panels]]


FIGURES = (
    FigureSpec(
        "overlap_published", "overlap", ("overlap", "published.overlap"),
        "The four published configurations: time of every method with its 95 % interval and its speedup over the "
        "sequential arm, in both protocols. Dashed: the ideal, max(T_comp, best T_comm).",
        published_configurations, place=0,
    ),
    FigureSpec(
        "overlap_synchronisation", "overlap", ("overlap", "published.overlap"),
        "The published protocol's speedup in two parts: what comes from removing the host's wait between the two "
        "sequential steps, and what comes from the overlap.",
        synchronisation, place=3,
    ),
    FigureSpec(
        "overlap_heatmap", "overlap", ("overlap",),
        "Collective size × matmul size: the ideal speedup, the measured one, and the fraction of ideal reached.",
        heatmap, place=4,
    ),
    FigureSpec(
        "overlap_timeline", "overlap", ("overlap_timeline",),
        "Profiler lanes of rank 0 on a common time axis, sequential above overlapped. Both sides are ready at the "
        "same moment there, so either may begin first, on each rank for itself.",
        timeline.overlap, place=5,
    ),
)  # fmt: skip
