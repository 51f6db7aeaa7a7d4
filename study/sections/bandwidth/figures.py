"""Figures of section 3: how fast the collectives move bytes."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from study.drawing import looks, style
from study.drawing.figure import FigureSpec
from study.published.tables import same_size
from study.sections.environment import figures as environment

TITLES = {
    "all_reduce": "all-reduce",
    "reduce_scatter": "reduce-scatter",
    "all_gather": "all-gather",
    "all_to_all": "all-to-all",
}


SPLIT_BYTES = 2**20  # below: latency, so time is drawn; above: the link's rate, so busbw on a linear axis


def busbw(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """All-reduce: time of small messages, bus bandwidth of large ones; below them bus bandwidth of the others.

    A line per backend, named at its end; the machine's limits lie above the bus bandwidths.
    """
    table = tables["bandwidth"].dropna(subset=["busbw_gb_per_s"])
    table = style.rows(table, "finished row").sort_values("bytes", kind="stable")
    limits = environment.bandwidth_limits(tables["environment"]) if "environment" in tables else {}
    moved = table["busbw_gb_per_s"] * table["time_us"]
    table = table.assign(busbw_lo_gb_per_s=moved / table["time_hi_us"], busbw_hi_gb_per_s=moved / table["time_lo_us"])
    reduced, others = (table[(table["collective"] == "all_reduce") == chosen] for chosen in (True, False))
    small, large = reduced[reduced["bytes"] <= SPLIT_BYTES], reduced[reduced["bytes"] >= SPLIT_BYTES]
    split = style.size_label(SPLIT_BYTES)
    above = [(f"all-reduce, S ≤ {split}", small, "time"), (f"all-reduce, S ≥ {split}", large, "busbw")]
    below = [(TITLES[name], others[others["collective"] == name], "log busbw") for name in TITLES]
    lines = [[panel for panel in line if len(panel[1])] for line in (above, below)]
    heights = [max(1.9, 1.2 + 0.11 * reduced["backend"].nunique()), 1.9]
    lines, heights = zip(*((line, height) for line, height in zip(lines, heights, strict=True) if line), strict=True)
    figure = style.new(style.WIDE_IN, 0.2 + sum(heights))
    parts = figure.subfigures(len(lines), 1, squeeze=False, height_ratios=heights)[:, 0]
    drawn = []
    for part, line in zip(parts, lines, strict=True):
        axes = part.subplots(1, len(line), squeeze=False)[0]
        drawn += [(axis, *panel) for axis, panel in zip(axes, line, strict=True)]
    for axis, title, rows, quantity in drawn:
        panel_of(axis, rows, quantity, limits)
        axis.set_title(title)
    if limits:
        handles = [Line2D([], [], color=looks.BLACK, linewidth=0.8, linestyle=environment.LIMIT_DASHES[name],
                          label=f"{name}, {style.digits(value)} GB/s") for name, value in limits.items()]  # fmt: skip
        figure.legend(handles=handles, loc="outside upper right", ncols=len(limits), handlelength=2.2)
    figure.draw_without_rendering()  # settles the heights that the labels are spaced by
    for axis, _, rows, quantity in drawn:
        column = "time_us" if quantity == "time" else "busbw_gb_per_s"
        last = rows.loc[rows.groupby("backend")["bytes"].idxmax()].set_index("backend")
        style.label_line_ends(axis, {name: (row["bytes"], row[column]) for name, row in last.iterrows()})
    data = table[["collective", "backend", "bytes", "time_us", "time_lo_us", "time_hi_us", "algbw_gb_per_s",
                  "busbw_gb_per_s", "busbw_lo_gb_per_s", "busbw_hi_gb_per_s"]]  # fmt: skip
    across = pd.DataFrame([{"collective": "limit", "backend": name, "busbw_gb_per_s": value}
                           for name, value in limits.items()])  # fmt: skip
    return figure, pd.concat([data, across], ignore_index=True)


def panel_of(axis: Axes, rows: pd.DataFrame, quantity: str, limits: Mapping[str, float]) -> None:
    """A line per backend over the message size: "time" (logarithmic), "busbw" (from 0) or "log busbw"."""
    name, unit = ("time", "us") if quantity == "time" else ("busbw", "gb_per_s")
    middle, low, high = (f"{name}_{end}{unit}" for end in ("", "lo_", "hi_"))
    for backend in looks.ordered(rows["backend"]):
        look, line = looks.look(backend), rows[rows["backend"] == backend]
        axis.plot(line["bytes"], line[middle], color=look.colour, marker=look.marker, markersize=3)
        axis.fill_between(line["bytes"], line[low], line[high], color=look.colour, alpha=0.2, linewidth=0)
    if quantity != "time":
        for name, value in limits.items():
            axis.axhline(value, color=looks.BLACK, linewidth=0.8, linestyle=environment.LIMIT_DASHES[name])
    style.byte_axis(axis, rows["bytes"].tolist(), most=3 if quantity == "log busbw" else 4)
    if quantity == "busbw":
        axis.set_ylim(0)
    else:
        axis.set_yscale("log")
        style.plain_log_ticks(axis.yaxis, subs=(1.0, 2.0, 5.0) if quantity == "time" else (1.0,))
    axis.set_xlabel("message size S")
    axis.set_ylabel("time (µs)" if quantity == "time" else "bus bandwidth (GB/s)")
    axis.grid(color=looks.LIGHT, linewidth=0.4)
    axis.set_axisbelow(True)


def published_sizes(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """Effective bandwidth, algbw and busbw of all-reduce at the published sizes, beside the published values.

    A row per size and backend, its numbers at the right. The machine's limits are lines in
    the panel of the busbw, the only one of the three that they bound.
    """
    limits = environment.bandwidth_limits(tables["environment"]) if "environment" in tables else {}
    published = tables["published.bandwidth"]
    table = tables["bandwidth"].dropna(subset=["busbw_gb_per_s"])
    table = table[table["collective"] == "all_reduce"]
    shown = [table[same_size(table["bytes"], size)].assign(bytes=size) for size in published["bytes"]]
    table = style.rows(pd.concat(shown), "finished all-reduce of a published size")
    table = table.assign(effective_gb_per_s=2 * table["algbw_gb_per_s"])
    panels = {"effective_gb_per_s": "effective, 2 S / t", "algbw_gb_per_s": "algbw, S / t", "busbw_gb_per_s": "busbw"}
    names, heights, ticks = [], [], []
    for size in sorted(table["bytes"].unique()):
        heads = heights[-1] + 1.4 if heights else 0.0
        names.append((size, ""))
        heights.append(heads)
        ticks.append(f"all-reduce of {style.size_label(size)}")
        of_size = table[table["bytes"] == size]
        for place, name in enumerate([*looks.ordered(of_size["backend"]), "published"], 1):
            names.append((size, name))
            heights.append(heads + place)
            ticks.append("published" if name == "published" else looks.look(name).label)
    figure = style.new(style.WIDE_IN, 0.8 + 0.125 * (heights[-1] + 1))
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (value, title) in zip(axes, panels.items(), strict=True):
        largest = max(table[value].max(), published[value].max())
        for (size, name), height in zip(names, heights, strict=True):
            if name == "":
                continue
            if name == "published":
                row, marks = published[published["bytes"] == size].iloc[0], {"marker": "D", "markerfacecolor": "white"}
                colour = looks.VERMILLION
            else:
                row = table[(table["bytes"] == size) & (table["backend"] == name)].iloc[0]
                colour, marks = looks.look(name).colour, {"marker": looks.look(name).marker}
                ends = [row[value] * row["time_us"] / row[f"time_{end}_us"] for end in ("hi", "lo")]
                axis.plot(ends, [height] * 2, color=colour, linewidth=1.4)
                largest = max(largest, *ends)
            axis.plot(row[value], height, color=colour, markersize=3.5, **marks)
            axis.annotate(style.digits(row[value]), (1.02, height), xycoords=axis.get_yaxis_transform(), va="center",
                          fontsize=5.5, annotation_clip=False)  # fmt: skip
        bounds = limits.values() if value == "busbw_gb_per_s" else ()
        axis.set_xlim(0, 1.05 * max([largest, *bounds]))
        axis.set_title(title)
        axis.set_xlabel("GB/s")
        axis.grid(axis="x", color=looks.LIGHT, linewidth=0.4)
        axis.set_axisbelow(True)
    for name, limit in limits.items():
        axes[-1].axvline(limit, color=looks.BLACK, linewidth=0.8, linestyle=environment.LIMIT_DASHES[name], zorder=0,
                         label=f"{name}, {style.digits(limit)} GB/s")  # fmt: skip
    if limits:
        figure.legend(loc="outside upper right", ncols=len(limits), handlelength=2.2)
    axes[0].set_yticks(heights, ticks, fontsize=6)
    for (_, name), label in zip(names, axes[0].get_yticklabels(), strict=True):
        label.set_fontweight("bold" if name == "" else "normal")
    for axis in axes:
        axis.tick_params(axis="y", length=0)
    axes[0].set_ylim(heights[-1] + 0.7, -0.7)
    columns = ["bytes", "backend", "time_us", *panels]
    return figure, pd.concat([table[columns], published.assign(backend="published")[columns]], ignore_index=True)


FIGURES = (
    FigureSpec(
        "bandwidth_busbw", "bandwidth", ("bandwidth",),
        "All-reduce: time of small messages and bus bandwidth of large ones, per backend; below: bus bandwidth of "
        "the other collectives. Lines across: the machine's limits.",
        busbw, optional=("environment",),
    ),
    FigureSpec(
        "bandwidth_published", "bandwidth", ("bandwidth", "published.bandwidth"),
        "The published sizes: effective bandwidth (2 S / t), algbw and busbw, measured and published; lines: the "
        "machine's limits of the busbw.",
        published_sizes, optional=("environment",),
    ),
)  # fmt: skip
