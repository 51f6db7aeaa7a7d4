"""Figure of section 1: what it costs a matmul when SMs (or a CPU's cores) are taken from it."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from study.drawing import looks, style
from study.drawing.figure import FigureSpec
from study.published.criteria import FREE_SLOWDOWN

HELD = "held"
# For as long as the matmul runs, by another way than a kernel that holds them.
WHOLE = {
    "sm_target": "cuBLAS told to leave them",
    "carveout": "torch's carve-out",
    "green_context": "green context",
    "threads": "fewer threads",
}

COLOURS = (looks.BLUE, looks.GREEN, looks.ORANGE, looks.VERMILLION, looks.PURPLE, looks.SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")
PANELS = 2  # side by side
TICKS = {
    "sm_target": "cuBLAS\ntold",
    "carveout": "carve-\nout",
    "green_context": "green\ncontext",
    "threads": "fewer threads",
}


def slowdowns(rows: pd.DataFrame) -> pd.DataFrame:
    """Finished rows of the table `sm_sharing` with t_alone_us (the matmul alone, of the same launch), slowdown and its
    interval slowdown_lo, slowdown_hi."""
    rows = rows.dropna(subset=["t_comp_us"])
    alone = rows[rows["technique"] == "alone"].set_index(["matmul_n", "asked"])["t_comp_us"].rename("t_alone_us")
    rows = rows[rows["technique"] != "alone"].join(alone, on=["matmul_n", "asked"]).dropna(subset=["t_alone_us"])
    ratios = {f"slowdown{end}": rows[f"t_comp{end}_us"] / rows["t_alone_us"] for end in ("", "_lo", "_hi")}
    return rows.assign(**ratios).sort_values(["matmul_n", "technique", "num_sms", "hold_part"], kind="stable")


def slowdown(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """Slowdown of a matmul over the part of its time for which SMs are held, a panel per n, a line per number of SMs.

    Right of the lines, as marks: as many taken for the whole matmul in another way. Dotted: what counts as free.
    """
    data = style.rows(slowdowns(tables["sm_sharing"]), "finished matmul with SMs taken from it")
    sizes, counts = sorted(data["matmul_n"].unique()), sorted(data["num_sms"].unique())
    others = [name for name in WHOLE if name in set(data["technique"])]
    held = data["technique"].eq(HELD).any()
    columns = min(PANELS, len(sizes))
    lines = -(-len(sizes) // columns)
    narrow = columns * (1 + held) < 3
    figure = style.new(style.NARROW_IN if narrow else style.WIDE_IN, 0.65 + 1.75 * lines)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axis in axes[len(sizes) :]:
        axis.set_axis_off()
    ticks = [0, 0.5, 1] if held else []
    places = {name: (1.38 + 0.42 * index if held else 0.5 + index) for index, name in enumerate(others)}
    for place, (axis, n) in enumerate(zip(axes, sizes, strict=False)):
        panel = data[data["matmul_n"] == n]
        axis.axhline(1, color=looks.BLACK, linewidth=0.8)
        axis.axhline(1 + FREE_SLOWDOWN, color=looks.GREY, linewidth=0.8, linestyle=":")
        for index, count in enumerate(counts):
            look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 3.5}
            of_count = panel[panel["num_sms"] == count]
            holds = of_count[of_count["technique"] == HELD].sort_values("hold_part")
            if len(holds):
                axis.plot([0, *holds["hold_part"]], [1, *holds["slowdown"]], markevery=range(1, len(holds) + 1), **look)
                axis.fill_between(holds["hold_part"], holds["slowdown_lo"], holds["slowdown_hi"],
                                  color=look["color"], alpha=0.2, linewidth=0)  # fmt: skip
            for name, where in places.items():
                shift = 0.07 * (index - (len(counts) - 1) / 2) * (1 if held else 1.5)
                for row in of_count[of_count["technique"] == name].itertuples():
                    axis.plot([where + shift] * 2, [row.slowdown_lo, row.slowdown_hi], color=look["color"])
                    axis.plot(where + shift, row.slowdown, linestyle="", **look)
        if held and others:
            axis.axvline(1.14, color=looks.LIGHT, linewidth=0.6)
        words = [TICKS[name] for name in others]
        axis.set_xticks([*ticks, *places.values()], [*(f"{tick:.0%}" for tick in ticks), *words])
        axis.tick_params(axis="x", labelsize=5.5 if others else None, labelbottom=place + columns >= len(sizes))
        axis.set_xlim(0, max([1.03, *(where + 0.22 for where in places.values())]) if held else len(others))
        alone = panel["t_alone_us"].median()
        scale, unit = style.time_unit(alone)
        axis.set_title(f"n = {n}, alone {style.digits(alone / scale)} {unit}")
        if place % columns == 0:
            axis.set_ylabel("matmul's time ÷ alone")
        if place + columns >= len(sizes) and held:
            axis.set_xlabel("held for this part of its time", loc="left")
        axis.grid(axis="y", color=looks.LIGHT, linewidth=0.4)
        axis.set_axisbelow(True)
    what = "SM" if held else "core"
    handles = [
        Line2D([], [], color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)], markersize=3.5,
               linestyle="-" if held else "", label=f"{count} {what}{'' if count == 1 else 's'} taken")
        for index, count in enumerate(counts)
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles) if not narrow else 2)
    columns = ["matmul_n", "technique", "num_sms", "hold_part", "t_alone_us", "t_comp_us", "slowdown", "slowdown_lo",
               "slowdown_hi"]  # fmt: skip
    return figure, data[columns]


FIGURES = (
    FigureSpec(
        "overlap_sm_sharing", "overlap", ("sm_sharing",),
        "A matmul's time when multiprocessors (on a CPU: cores) are taken from it, over its time alone: held by "
        "another kernel for a part of that time, or for all of it by other means. Dotted: what counts as free.",
        slowdown, place=2,
    ),
)  # fmt: skip
