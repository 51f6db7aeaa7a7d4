"""Timelines: what a profiler saw on rank 0, method above method."""

from collections.abc import Callable, Mapping

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from study.drawing import looks, style

CATEGORIES = {
    "comm": (looks.ORANGE, "all-reduce"),
    "compute": (looks.BLUE, "matmul"),
    "fused": (looks.PURPLE, "matmul and all-reduce in one kernel"),
    "wait": (looks.LIGHT, "waiting for tiles"),
}
# Kernels that only wait; a profiler takes them for part of the all-reduce.
WAITING = "wait_tiles"
TIMINGS = {"graph": ", graph replay", "eager": ", launched by the host"}
# Clocks of the profiler: what ends this little after the next begins follows it.
TOLERANCE_US = 0.05


def overlap(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """Section 1, a panel per published configuration."""
    return lanes_of(
        tables["overlap_timeline"], "configuration",
        lambda row: f"{style.size_label(row['comm_bytes'])}, n = {row['matmul_n']}",
    )  # fmt: skip


def linear(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """Section 5, a panel per layer."""
    table = tables["linear_timeline"]
    table = table.assign(category=table["category"].mask(table["name"].str.startswith(WAITING), "wait"))
    return lanes_of(table[table["correct"]], "layer", lambda row: f"M = {row['m']}, N = {row['n']}, K = {row['k']}")


def lanes_of(table: pd.DataFrame, by: str, size: Callable[[pd.Series], str]) -> tuple[Figure, pd.DataFrame]:
    """Rank 0's profiler lanes, a panel per value of the column `by`: the methods on one time axis.

    What overlaps in one lane is drawn in rows of its own below the lane's name. `size(row)` is part of the title.
    """
    table = style.rows(table[(table["rank"] == 0) & (table["duration_us"] > 0)], "profiled event of rank 0")
    names = list(dict.fromkeys(table[by]))
    lanes = {
        name: [
            (method, lane if number == 0 else "", events)
            for method in looks.ordered(rows["method"])
            for lane, group in rows[rows["method"] == method]
            .sort_values(["category", "start_us"])
            .groupby("lane", sort=False)
            for number, events in enumerate(lane_rows(group))
        ]
        for name, rows in table.groupby(by, sort=False)
    }
    figure = style.new(style.WIDE_IN, 0.3 + sum(0.62 + 0.2 * len(lanes[name]) for name in names))
    axes = figure.subplots(
        len(names), 1, squeeze=False, gridspec_kw={"height_ratios": [3 + len(lanes[n]) for n in names]}
    )
    for axis, name in zip(axes[:, 0], names, strict=True):
        rows = table[table[by] == name]
        end = (rows["start_us"] + rows["duration_us"]).max()
        scale, unit = style.time_unit(end)
        for place, (_, _, events) in enumerate(lanes[name]):
            for category, group in events.groupby("category"):
                spans = list(zip(group["start_us"] / scale, group["duration_us"] / scale, strict=True))
                axis.broken_barh(spans, (place - 0.36, 0.72), facecolor=CATEGORIES[category][0], linewidth=0)
        previous = None
        for place, (method, _, _) in enumerate(lanes[name]):
            if method != previous:
                mine = rows[rows["method"] == method]
                stop = (mine["start_us"] + mine["duration_us"]).max() / scale
                last = place + sum(entry[0] == method for entry in lanes[name]) - 0.5
                axis.plot([stop, stop], [place - 0.5, last], color=looks.BLACK, linewidth=0.8)
                axis.annotate(f"{style.digits(stop)} {unit}", (stop, (place - 0.5 + last) / 2), xytext=(3, 0),
                              textcoords="offset points", va="center", fontsize=6)  # fmt: skip
                if place:
                    axis.axhline(place - 0.5, color=looks.LIGHT, linewidth=0.6)
            previous = method
        axis.set_yticks(
            range(len(lanes[name])),
            [f"{looks.look(method).label}: {lane}" if lane else "" for method, lane, _ in lanes[name]],
        )
        axis.set_ylim(len(lanes[name]) - 0.5, -0.5)
        axis.set_xlim(0, 1.1 * end / scale)
        axis.set_xlabel(f"time ({unit})")
        how = "".join(TIMINGS.get(timing, "") for timing in rows["timing"].unique()) if "timing" in rows else ""
        axis.set_title(f"{name}: {size(rows.iloc[0])}{how}")
    present = {"comm", "compute"} | set(table["category"])
    handles = [matplotlib.patches.Patch(color=colour, label=label) for category, (colour, label) in CATEGORIES.items()
               if category in present]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), handlelength=1)
    columns = [by, "method", "lane", "name", "category", "start_us", "duration_us", "timing"]
    return figure, table[[column for column in columns if column in table]]


def lane_rows(events: pd.DataFrame) -> list[pd.DataFrame]:
    """A profiler lane's events as rows without overlap: one where they follow each other, else apart by category."""
    if len(apart(events)) == 1:
        return [events]
    return [row for _, group in events.groupby("category") for row in apart(group)]


def apart(events: pd.DataFrame) -> list[pd.DataFrame]:
    """The events in rows, each into the first row that is free at its start."""
    rows: list[list] = []
    ends: list[float] = []
    for index, event in events.sort_values("start_us").iterrows():
        place = next((n for n, end in enumerate(ends) if end <= event["start_us"] + TOLERANCE_US), len(rows))
        if place == len(rows):
            rows.append([])
            ends.append(0.0)
        rows[place].append(index)
        ends[place] = event["start_us"] + event["duration_us"]
    return [events.loc[row] for row in rows]
