"""Figures of section 2: inference latency, what each step contributes, and batches."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from study.drawing import looks, style
from study.drawing.figure import FigureSpec


def batch_one(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of batch 1, one per arm, in the order of the arms."""
    table = style.rows(table[table["batch"] == 1].dropna(subset=["e2e_ms"]), "finished row of batch 1")
    return table.set_index("arm").loc[looks.ordered(table["arm"])].reset_index()


def latency(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """E2E per arm at batch 1 as a bar of TTFT and the remaining tokens; the published latencies as diamonds."""
    table = batch_one(tables["inference"])
    published = tables["published.inference"].set_index("arm")["e2e_ms"]
    table["published_e2e_ms"] = table["arm"].map(published)
    scale, unit = style.time_unit(1e3 * max(table["e2e_hi_ms"].max(), table["published_e2e_ms"].max()))
    scale /= 1e3
    figure = style.new(style.WIDE_IN, 0.75 + 0.36 * len(table))
    axis = figure.subplots()
    longest = max(table["e2e_hi_ms"].max(), table["published_e2e_ms"].max()) / scale
    baseline = table.loc[table["arm"] == "transformers_eager", "e2e_ms"]
    for place, row in table.iterrows():
        look = looks.look(row["arm"])
        first, total = row["ttft_ms"] / scale, row["e2e_ms"] / scale
        axis.barh(place, first, color=look.colour, height=0.55)
        axis.barh(place, total - first, left=first, color=look.colour, alpha=0.4, height=0.55)
        axis.plot([row["e2e_lo_ms"] / scale, row["e2e_hi_ms"] / scale], [place, place], color=looks.BLACK)
        text = f"{style.digits(total)} {unit}"
        if len(baseline):
            text += f", {baseline.iloc[0] / row['e2e_ms']:.2f}×"
        right = max(row["e2e_hi_ms"], row["published_e2e_ms"] if row["published_e2e_ms"] > 0 else 0) / scale
        axis.annotate(
            f"{text}\nTTFT {style.digits(row['ttft_ms'])} ms + "
            f"{row['new_tokens'] - 1:.0f} × {style.digits(row['tpot_ms'])} ms",
            (right, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=6.5,
        )  # fmt: skip
        if row["published_e2e_ms"] > 0:
            axis.plot(row["published_e2e_ms"] / scale, place, "D", markerfacecolor="white", color=looks.VERMILLION)
    axis.plot([], [], "D", markerfacecolor="white", color=looks.VERMILLION, label="published, other hardware")
    axis.barh(0, 0, color=looks.GREY, label="time to first token")
    axis.barh(0, 0, color=looks.GREY, alpha=0.4, label="remaining tokens")
    figure.legend(loc="outside upper left", ncols=3, handlelength=1.2)
    axis.set_yticks(range(len(table)), [looks.look(arm).label for arm in table["arm"]])
    axis.set_ylim(len(table) - 0.5, -0.5)
    axis.set_xlim(0, longest * 1.42)
    axis.set_xlabel(f"end-to-end latency ({unit}), batch 1, {table['new_tokens'].iloc[0]:.0f} new tokens")
    columns = ["arm", "e2e_ms", "e2e_lo_ms", "e2e_hi_ms", "ttft_ms", "tpot_ms", "new_tokens", "published_e2e_ms"]
    return figure, table[columns]


def attribution(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """A waterfall per route from transformers eager to vLLM at batch 1; each step with its factor and interval."""
    steps = tables["inference_attribution"]
    steps = style.rows(steps[steps["batch"] == 1], "step between two finished arms of batch 1")
    table = batch_one(tables["inference"]).set_index("arm")
    routes = list(dict.fromkeys(steps["route"]))
    scale, unit = style.time_unit(1e3 * steps[["e2e_before_ms", "e2e_after_ms"]].max().max())
    scale /= 1e3
    figure = style.new(style.WIDE_IN if len(routes) > 1 else style.NARROW_IN, 2.4)
    axes = figure.subplots(1, len(routes), sharey=True, squeeze=False)[0]
    for axis, route in zip(axes, routes, strict=True):
        rows = steps[steps["route"] == route].sort_values("step")
        arms = [rows["from_arm"].iloc[0], *rows["to_arm"]]
        factors = [None, *rows[["factor", "factor_lo", "factor_hi"]].itertuples(index=False)]
        for place, (arm, factor) in enumerate(zip(arms, factors, strict=True)):
            height, low, high = (table.loc[arm, name] / scale for name in ("e2e_ms", "e2e_lo_ms", "e2e_hi_ms"))
            axis.bar(place, height, color=looks.look(arm).colour, width=0.55)
            axis.plot([place, place], [low, high], color=looks.GREY, linewidth=1)
            text, top = f"{style.digits(height)} {unit}", high
            if factor is not None:
                before = table.loc[arms[place - 1], "e2e_ms"] / scale
                edge = place - 0.72, place + 0.4
                axis.plot(edge, [before, before], color=looks.BLACK, linewidth=0.6, linestyle=":")
                arrow = {"arrowstyle": "->", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
                axis.annotate("", (place + 0.34, height), (place + 0.34, before), arrowprops=arrow)
                text += f"\n÷ {factor.factor:.2f} [{factor.factor_lo:.2f}, {factor.factor_hi:.2f}]"
                top = max(high, before)
            axis.annotate(text, (place, top), xytext=(0, 3), textcoords="offset points", ha="center", va="bottom")
        axis.set_title(route)
        axis.set_xticks(range(len(arms)), [looks.look(arm).label for arm in arms])
        axis.set_xlim(-0.5, len(arms) - 0.4)
    axes[0].set_ylim(0, 1.25 * table["e2e_hi_ms"].max() / scale)
    axes[0].set_ylabel(f"end-to-end latency ({unit}), batch 1")
    if {"transformers_eager", "vllm"} <= set(table.index):
        whole = table.loc["transformers_eager", "e2e_ms"] / table.loc["vllm", "e2e_ms"]
        published = tables["published.inference"].set_index("arm")["speedup"]["vllm"]
        figure.suptitle(f"transformers eager ÷ vLLM: {whole:.2f}× here, {published:.2f}× published", fontsize=7)
    columns = ["route", "step", "adds", "from_arm", "to_arm", "e2e_before_ms", "e2e_after_ms", "factor", "factor_lo",
               "factor_hi", "log_share"]  # fmt: skip
    return figure, steps[columns]


def batch(tables: Mapping[str, pd.DataFrame], machine_name: str) -> tuple[Figure, pd.DataFrame]:
    """Tokens per second and TPOT over the batch size, a line per arm."""
    table = style.rows(tables["inference"].dropna(subset=["tokens_per_s"]), "finished row")
    figure = style.new(style.WIDE_IN, 2.6)
    axes = figure.subplots(1, 2)
    batches = sorted(table["batch"].unique())
    ends = []
    for arm in looks.ordered(table["arm"]):
        look = looks.look(arm)
        lines = table[table["arm"] == arm].sort_values("batch")
        low, high = (lines["batch"] * lines["new_tokens"] / lines[f"e2e_{end}_ms"] * 1e3 for end in ("hi", "lo"))
        rate = lines["tokens_per_s"]
        axes[0].errorbar(lines["batch"], rate, [(rate - low).clip(lower=0), (high - rate).clip(lower=0)],
                         color=look.colour, marker=look.marker, capsize=1.5)  # fmt: skip
        axes[1].plot(lines["batch"], lines["tpot_ms"], color=look.colour, marker=look.marker)
        single = lines[lines["batch"] == 1]
        if len(single) and len(lines) > 1:
            axes[0].plot(lines["batch"], single["tokens_per_s"].iloc[0] * lines["batch"], color=look.colour,
                         linestyle=(0, (4, 2)), linewidth=0.6)  # fmt: skip
        ends.append((lines["batch"].iloc[-1], lines["tpot_ms"].iloc[-1], look.label, look.colour))
    for axis, label in zip(axes, ("tokens per second", "time per output token (ms)"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(batches, [str(size) for size in batches])
        axis.set_xlabel("batch size")
        axis.set_ylabel(label)
        axis.grid(color=looks.LIGHT, linewidth=0.4)
        style.plain_log_ticks(axis.yaxis)
    axes[0].set_title("dashed: batch 1 scaled linearly")
    figure.draw_without_rendering()
    style.label_ends(axes[1], ends)
    columns = ["arm", "batch", "new_tokens", "e2e_ms", "e2e_lo_ms", "e2e_hi_ms", "tokens_per_s", "tpot_ms"]
    return figure, table[columns].replace(np.inf, np.nan)


FIGURES = (
    FigureSpec(
        "inference_latency", "inference", ("inference", "published.inference"),
        "End-to-end latency of batch 1 per arm, split into time to first token and the remaining tokens; 95 % "
        "interval of the sum. Diamonds: the published latencies, of other hardware.",
        latency,
    ),
    FigureSpec(
        "inference_attribution", "inference", ("inference_attribution", "inference", "published.inference"),
        "Two ways from transformers eager to vLLM at batch 1, step by step; the factors of a way multiply to the "
        "whole. Compiled: static cache and torch.compile, with CUDA graphs on GPUs.",
        attribution,
    ),
    FigureSpec(
        "inference_batch", "inference", ("inference",),
        "Throughput and time per output token over batch size. Dashed: batch 1 scaled linearly.",
        batch,
    ),
)  # fmt: skip
