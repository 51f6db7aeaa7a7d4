"""Figure of section 1: how near each technique comes to the ideal in the published configurations."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from study.drawing import looks, style
from study.drawing.figure import FigureSpec
from study.published.criteria import TARGETS

MARGIN = 0.27  # of a panel, right of the ideal: the numbers
LEAST = 0.5  # where the axis begins, or below by EDGE of the least fraction
EDGE = 0.06


def techniques(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """Fraction of ideal of every method, a panel per published configuration; 95 % interval of the overlapped time.

    Solid line: the ideal. Dashed: the fraction that the techniques are to reach on so many GPUs. The best number of a
    panel is bold.
    """
    names = tables["published.overlap"]["configuration"]
    table = tables["overlap"]
    table = table[table["configuration"].isin(names) & (table["protocol"] == "device")]
    table = style.rows(table, "row of a published configuration in the device protocol")
    for end, time in (("", ""), ("_lo", "_hi"), ("_hi", "_lo")):
        table[f"fraction{end}"] = table["ideal_us"] / table[f"t_overlap{time}_us"]
    names = [name for name in names if name in set(table["configuration"])]
    order = looks.ordered(table["method"])
    least = min(LEAST, table["fraction_lo"].min() - EDGE)
    most = max(1.0, table["fraction"].max())  # a time below the ideal is noise, and shown
    right = most + MARGIN * (most - least)
    wanted = TARGETS.get(int(table["num_ranks"].iloc[0])) if (table["backend"] != "gloo").all() else None
    figure = style.new(style.WIDE_IN, 0.95 + 0.145 * len(order))
    axes = figure.subplots(1, len(names), squeeze=False, sharex=True, sharey=True)[0]
    for axis, name in zip(axes, names, strict=True):
        cell = table[table["configuration"] == name].set_index("method", drop=False)
        axis.axvline(1, color=looks.BLACK, linewidth=0.8)
        if wanted:
            axis.axvline(wanted.fraction_of_ideal, color=looks.BLACK, linestyle=(0, (4, 2)), linewidth=0.8)
        best = cell["fraction"].max()
        for place, method in enumerate(order):
            if method in cell.index:
                draw_fraction(axis, place, cell.loc[method], cell.loc[method, "fraction"] == best, right)
        axis.set_ylim(len(order) - 0.4, -0.6)
        axis.set_xlim(least, right)
        axis.set_xticks([tick / 100 for tick in range(0, 101, 25 if least > 0.1 else 50) if tick / 100 >= least])
        axis.grid(axis="x", color=looks.LIGHT, linewidth=0.4)
        axis.set_axisbelow(True)
        size = f"{style.size_label(cell['comm_bytes'].iloc[0])}, n = {cell['matmul_n'].iloc[0]}"
        ideal = cell["ideal_us"].median()
        scale, unit = style.time_unit(ideal)
        axis.set_title(f"{name.replace(', ', ',' + chr(10))}\n{size}\nideal {style.digits(ideal / scale)} {unit}")
    axes[0].set_yticks(range(len(order)), [looks.look(method).label for method in order])
    figure.supxlabel("fraction of ideal" + (f" (dashed: {wanted.fraction_of_ideal:g})" if wanted else ""), fontsize=7)
    columns = ["configuration", "comm_bytes", "matmul_n", "method", "backend", "t_overlap_us", "ideal_us",
               "fraction", "fraction_lo", "fraction_hi"]  # fmt: skip
    return figure, table[columns]


def draw_fraction(axis, place: int, row: pd.Series, best: bool, right: float) -> None:
    """One method's fraction with its interval, the number at the right edge; "failed" where the arm failed."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}  # over an interval that reaches below it
    at_edge = {"xy": (right, place), "va": "center", "ha": "right", "fontsize": 6, "bbox": box}
    if pd.isna(row["fraction"]):
        axis.annotate("failed", **at_edge)
        return
    look = looks.look(row["method"])
    axis.plot([row["fraction_lo"], row["fraction_hi"]], [place, place], color=look.colour, linewidth=1.6,
              solid_capstyle="butt")  # fmt: skip
    axis.plot(row["fraction"], place, color=look.colour, marker=look.marker, markersize=4)
    axis.annotate(f"{row['fraction']:.2f}", fontweight="bold" if best else "normal", **at_edge)


FIGURES = (
    FigureSpec(
        "overlap_techniques", "overlap", ("overlap", "published.overlap"),
        "How near each technique comes to the ideal, max(T_comp, best T_comm), in the published configurations: "
        "fraction of ideal in the device protocol, with the 95 % interval of the overlapped time; bold: the best.",
        techniques, place=1,
    ),
)  # fmt: skip
