"""Figures of section 3: how fast the collectives move bytes."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from maco_lib.study.figures import environment, style
from maco_lib.study.published import same_size

TITLES = {
    "all_reduce": "all-reduce",
    "reduce_scatter": "reduce-scatter",
    "all_gather": "all-gather",
    "all_to_all": "all-to-all",
}


def busbw(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """Bus bandwidth over bytes, a panel per collective, a line per backend, the machine's limits above them."""
    table = tables["bandwidth"].dropna(subset=["busbw_gb_per_s"])
    table = style.rows(table, "finished row").sort_values("bytes", kind="stable")
    limits = environment.bandwidth_limits(tables["environment"]) if "environment" in tables else {}
    collectives = [name for name in TITLES if name in set(table["collective"])]
    figure = style.new(style.WIDE_IN, 2.9)
    axes = figure.subplots(1, len(collectives), sharey=True, squeeze=False)[0]
    scale = table["busbw_gb_per_s"] / (table["algbw_gb_per_s"] * table["time_us"])
    table = table.assign(
        busbw_lo_gb_per_s=scale * table["algbw_gb_per_s"] * table["time_us"] ** 2 / table["time_hi_us"]
    )
    table["busbw_hi_gb_per_s"] = scale * table["algbw_gb_per_s"] * table["time_us"] ** 2 / table["time_lo_us"]
    for axis, collective in zip(axes, collectives, strict=True):
        panel = table[table["collective"] == collective]
        for backend in style.ordered(panel["backend"]):
            look, line = style.look(backend), panel[panel["backend"] == backend]
            axis.plot(line["bytes"], line["busbw_gb_per_s"], color=look.colour, marker=look.marker, markersize=3)
            axis.fill_between(line["bytes"], line["busbw_lo_gb_per_s"], line["busbw_hi_gb_per_s"], color=look.colour,
                              alpha=0.2, linewidth=0)  # fmt: skip
        for name, value in limits.items():
            axis.axhline(value, color=style.BLACK, linewidth=0.8, linestyle=environment.LIMIT_DASHES[name])
        style.byte_axis(axis, panel["bytes"].tolist(), most=5)
        axis.tick_params(axis="x", rotation=35)
        axis.set_yscale("log")
        axis.set_title(TITLES[collective])
        axis.set_xlabel("message size S")
        axis.grid(color=style.LIGHT, linewidth=0.4)
    style.plain_log_ticks(axes[0].yaxis)
    axes[0].set_ylabel("bus bandwidth (GB/s)")
    handles = [
        Line2D([], [], color=style.look(name).colour, marker=style.look(name).marker, label=style.look(name).label)
        for name in style.ordered(table["backend"])
    ]
    handles += [
        Line2D([], [], color=style.BLACK, linewidth=0.8, linestyle=environment.LIMIT_DASHES[name],
               label=f"{name}, {value:.3g} GB/s") for name, value in limits.items()
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper left", ncols=4, handlelength=2.2, columnspacing=1.2)
    data = table[["collective", "backend", "bytes", "time_us", "time_lo_us", "time_hi_us", "algbw_gb_per_s",
                  "busbw_gb_per_s", "busbw_lo_gb_per_s", "busbw_hi_gb_per_s"]]  # fmt: skip
    drawn = pd.DataFrame([{"collective": "limit", "backend": name, "busbw_gb_per_s": value}
                          for name, value in limits.items()])  # fmt: skip
    return figure, pd.concat([data, drawn], ignore_index=True)


def published_sizes(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """Effective bandwidth, algbw and busbw of all-reduce at the published sizes, beside the published values.

    The machine's limits are lines in the panel of the busbw, the only one of the three that they bound.
    """
    limits = environment.bandwidth_limits(tables["environment"]) if "environment" in tables else {}
    published = tables["published.bandwidth"]
    table = tables["bandwidth"].dropna(subset=["busbw_gb_per_s"])
    table = table[table["collective"] == "all_reduce"]
    shown = [table[same_size(table["bytes"], size)].assign(bytes=size) for size in published["bytes"]]
    table = pd.concat(shown)
    table = style.rows(table, "finished all-reduce of a published size")
    table = table.assign(effective_gb_per_s=2 * table["algbw_gb_per_s"])
    panels = {"effective_gb_per_s": "effective, 2 S / t", "algbw_gb_per_s": "algbw, S / t", "busbw_gb_per_s": "busbw"}
    sizes = sorted(table["bytes"].unique())
    backends = style.ordered(table["backend"])
    rows = [*backends, "published"]
    figure = style.new(style.WIDE_IN, 0.7 + len(sizes) * (0.25 + 0.13 * len(rows)))
    axes = figure.subplots(1, 3, sharey=True, sharex=True)
    step = 0.8 / len(rows)
    values = pd.concat([table[list(panels)], published[list(panels)]])
    for axis, (value, title) in zip(axes, panels.items(), strict=True):
        for place, size in enumerate(sizes):
            for offset, name in enumerate(rows):
                height = place - 0.4 + step * (offset + 0.5)
                if name == "published":
                    found = published[published["bytes"] == size]
                    label, colour, marker, face = "published", style.VERMILLION, "D", "white"
                else:
                    found = table[(table["bytes"] == size) & (table["backend"] == name)]
                    look = style.look(name)
                    label, colour, marker, face = look.label, look.colour, look.marker, look.colour
                if found.empty:
                    continue
                row = found.iloc[0]
                if name != "published":
                    ends = [row[value] * row["time_us"] / row[f"time_{end}_us"] for end in ("hi", "lo")]
                    axis.plot(ends, [height] * 2, color=colour, linewidth=1.4)
                axis.plot(row[value], height, marker=marker, color=colour, markerfacecolor=face)
                right = row[value] if name == "published" else max(ends)
                axis.annotate(f"{style.digits(row[value])}  {label}", (right, height), xytext=(5, 0), va="center",
                              textcoords="offset points", fontsize=5.5, color=colour,
                              bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3})  # fmt: skip
        axis.set_xscale("log")
        style.plain_log_ticks(axis.xaxis, subs=(1.0,))
        axis.set_xlim(values.min().min() / 1.5, max(values.max().max(), *limits.values(), 0) * 40)
        axis.set_title(title)
        axis.set_xlabel("GB/s")
        axis.grid(axis="x", color=style.LIGHT, linewidth=0.4)
        axis.set_axisbelow(True)
        for border in range(1, len(sizes)):
            axis.axhline(border - 0.5, color=style.LIGHT, linewidth=0.6)
    for name, limit in limits.items():
        axes[-1].axvline(limit, color=style.BLACK, linewidth=0.8, linestyle=environment.LIMIT_DASHES[name], zorder=0,
                         label=f"{name}, {style.digits(limit)} GB/s")  # fmt: skip
    if limits:
        figure.legend(loc="outside upper right", ncols=len(limits), handlelength=2.2)
    axes[0].set_yticks(range(len(sizes)), [style.size_label(size) for size in sizes])
    axes[0].set_ylim(len(sizes) - 0.5, -0.5)
    axes[0].set_ylabel("all-reduce size")
    columns = ["bytes", "backend", "time_us", *panels]
    return figure, pd.concat([table[columns], published.assign(backend="published")[columns]], ignore_index=True)
