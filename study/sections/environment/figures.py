"""Figure of the environment section: the ceilings, and the limits that other figures draw in."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.drawing import looks, style
from study.drawing.figure import FigureSpec

LIMIT_DASHES = {"link limit": (0, (6, 2)), "best peer copy": (0, (2, 1.5)), "memory copy": (0, (1, 1))}
COPIES = {
    "link_limit": "link limit",
    "peer_write": "peer write",
    "peer_read": "peer read",
    "memory_copy": "memory copy",
    "host_to_device": "host to device",
    "device_to_host": "device to host",
}
DTYPES = {"bf16": (looks.BLUE, "o"), "fp16": (looks.GREEN, "^"), "fp32": (looks.ORANGE, "s")}


def bandwidth_limits(environment: pd.DataFrame) -> dict[str, float]:
    """GB/s of what a collective cannot exceed: link limit and best peer copy on GPUs, memory copy on a CPU."""
    value = environment.dropna(subset=["value"]).groupby("quantity")["value"].max()
    if "peer_write" in value.index:
        limits = {"link limit": value.get("link_limit"), "best peer copy": value[["peer_write", "peer_read"]].max()}
        return {name: limit for name, limit in limits.items() if limit is not None}
    return {"memory copy": value["memory_copy"]} if "memory_copy" in value.index else {}


def ceilings(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """Matmul rate over size, of square and of skinny matmuls, and copy bandwidths beside the link limit."""
    table = style.rows(tables["environment"].dropna(subset=["value"]), "finished row")
    matmul = table[table["quantity"] == "matmul"]
    square = matmul[(matmul["m"] == matmul["n"]) & (matmul["n"] == matmul["k"])]
    skinny = matmul.drop(square.index)
    figure = style.new(style.WIDE_IN, 2.3)
    axes = figure.subplots(1, 3, gridspec_kw={"width_ratios": [1.1, 1, 1.3]})
    rates(axes[0], square, "n", "n × n × n")
    if len(skinny):
        rates(axes[1], skinny, "m", f"m × {skinny['n'].iloc[0]} × {skinny['k'].iloc[0]}")
    else:
        axes[1].set_axis_off()
    copies(axes[2], table)
    columns = ["quantity", "device", "peer", "dtype", "m", "n", "k", "bytes", "threads",
               "value", "value_lo", "value_hi",
               "unit", "time_us", "source"]  # fmt: skip
    return figure, table[columns]


def rates(axis: Axes, rows: pd.DataFrame, size: str, shape: str) -> None:
    """Matmul rate over `size`, a line per dtype and number of threads."""
    threads = sorted(rows["threads"].unique())
    ends = []
    for (dtype, count), line in rows.sort_values(size, kind="stable").groupby(["dtype", "threads"]):
        colour, marker = DTYPES[dtype]
        face = colour if count == threads[-1] else "white"
        axis.plot(line[size], line["value"], color=colour, marker=marker, markerfacecolor=face)
        axis.fill_between(line[size], line["value_lo"], line["value_hi"], color=colour, alpha=0.25, linewidth=0)
        label = dtype if len(threads) == 1 else f"{dtype}, {count} thr."
        ends.append((line[size].iloc[-1], line["value"].iloc[-1], label, colour))
    sizes = sorted(rows[size].unique())
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sizes, [str(value) for value in sizes], rotation=45)
    axis.minorticks_off()
    style.plain_log_ticks(axis.yaxis)
    axis.set_xlabel(size)
    axis.set_ylabel("matmul rate (TFLOP/s)")
    axis.set_title(shape)
    axis.grid(color=looks.LIGHT, linewidth=0.4)
    axis.figure.draw_without_rendering()
    style.label_ends(axis, ends)


def copies(axis: Axes, table: pd.DataFrame) -> None:
    """Bandwidth of every kind of copy as a bar; the link limit as a line."""
    bars = []
    for quantity, label in COPIES.items():
        found = table[(table["quantity"] == quantity)]
        if quantity == "link_limit" or found.empty:
            continue
        several = found["threads"].nunique() > 1
        for row in found.sort_values(["threads", "peer"]).to_dict("records"):
            detail = f", {row['threads']} thr." if several else f" {row['peer']}" if row["peer"] else ""
            bars.append((label + detail, row))
    for place, (_, row) in enumerate(bars):
        axis.barh(place, row["value"], color=looks.SKY, height=0.6)
        axis.plot([row["value_lo"], row["value_hi"]], [place, place], color=looks.BLACK, linewidth=1)
        axis.annotate(style.digits(row["value"]), (0, place), xycoords=("axes fraction", "data"), xytext=(3, 0),
                      textcoords="offset points", va="center", fontsize=6)  # fmt: skip
    longest = max(row["value_hi"] for _, row in bars)
    limit = table.loc[table["quantity"] == "link_limit", "value"]
    if len(limit):
        # Between links, not inside one device's memory, so only the peer copies' bars are held against it.
        height = sum(label.startswith("peer") for label, _ in bars) - 0.5
        axis.plot([limit.iloc[0]] * 2, [-0.5, height], color=looks.BLACK, linestyle=LIMIT_DASHES["link limit"])
        axis.annotate(f"link limit {style.digits(limit.iloc[0])}", (limit.iloc[0], -0.5), xytext=(0, 3), ha="center",
                      textcoords="offset points", fontsize=6)  # fmt: skip
        longest = max(longest, limit.iloc[0])
    if len(limit) and longest > 5 * limit.iloc[0]:
        axis.set_xscale("log")
        style.plain_log_ticks(axis.xaxis, subs=(1.0,))
        axis.set_xlim(min(row["value_lo"] for _, row in bars) / 6, longest * 2)
    else:
        axis.set_xlim(0, longest * 1.1)
    axis.set_yticks(range(len(bars)), [label for label, _ in bars])
    axis.set_ylim(len(bars) - 0.5, -1.2 if len(limit) else -0.5)
    axis.set_xlabel("bandwidth (GB/s)")


FIGURES = (
    FigureSpec(
        "environment_ceilings", "environment", ("environment",),
        "Measured ceilings of this machine, against which everything else is judged.",
        ceilings,
    ),
)  # fmt: skip
