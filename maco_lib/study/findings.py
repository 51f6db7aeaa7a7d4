"""The sentences of the report's summary, each from one machine's tables and with the figure that shows it."""

import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from maco_lib.study import published
from maco_lib.study.claims_measured import inference_ratio, overlap_ratio
from maco_lib.study.criteria import milliseconds
from maco_lib.study.evidence import Evidence, Missing
from maco_lib.study.figures.style import look


@dataclass(frozen=True)
class Topic:
    """One finding to take home: a heading, the figure that shows it, and its lines for a machine."""

    heading: str
    figure: str
    lines: Callable[[Evidence, pathlib.Path], list[str]]


def speedup(before_us: float, after_us: float) -> str:
    return f"{before_us / after_us:.2f}× ({milliseconds(before_us / 1e3)} → {milliseconds(after_us / 1e3)})"


def configurations(evidence: Evidence, root: pathlib.Path) -> pd.DataFrame:
    """Finished rows of the published configurations; raises Missing when there are none."""
    names = published.numbers(root, "overlap")["configuration"]
    rows = evidence.table("overlap")
    rows = rows[rows["configuration"].isin(names)].dropna(subset=["t_overlap_us"])
    if rows.empty:
        raise Missing("no published configuration was finished")
    return rows


def removed_wait(evidence: Evidence, root: pathlib.Path) -> list[str]:
    """How the published-style speedup of each configuration splits into removed synchronisation and overlap."""
    rows = configurations(evidence, root)
    rows = rows[rows["protocol"] == "published"].set_index(["configuration", "method"])["t_overlap_us"]
    parts = []
    for name in rows.index.get_level_values("configuration").unique():
        steps = ("sequential", "sequential_unsynchronised", "two_stream")
        if all((name, step) in rows.index for step in steps):
            waiting, free, overlapped = (rows[(name, step)] for step in steps)
            parts.append(f"{name}: {speedup(waiting, overlapped)} = {waiting / free:.2f}× from the removed wait · "
                         f"{free / overlapped:.2f}× from the overlap")  # fmt: skip
    if not parts:
        raise Missing("no configuration has all three arms of the published protocol")
    return parts


def share_of_ideal(evidence: Evidence, root: pathlib.Path) -> list[str]:
    """What two streams and the fastest method reach of the ideal without a host in the loop."""
    rows = configurations(evidence, root)
    rows = rows[(rows["protocol"] == "device") & ~rows["method"].str.startswith("sequential")]
    parts = []
    for name, group in rows.groupby("configuration", sort=False):
        best = group.loc[group["t_overlap_us"].idxmin()]
        plain = group[group["method"] == "two_stream"]
        ideal = f"ideal {speedup(best['t_seq_us'], best['ideal_us'])}"
        text = f"{name}: "
        if len(plain):
            text += f"two streams {speedup(plain['t_seq_us'].iloc[0], plain['t_overlap_us'].iloc[0])}, "
        if best["method"] != "two_stream":
            text += f"{look(best['method']).label} {speedup(best['t_seq_us'], best['t_overlap_us'])}, "
        parts.append(text + ideal)
    if not parts:
        raise Missing("nothing was measured in the device protocol")
    return parts


def inference(evidence: Evidence, root: pathlib.Path) -> list[str]:
    """vLLM over transformers at batch 1, and the step of compilation and graphs in each engine."""
    printed = published.numbers(root, "inference").set_index("arm").loc["vllm", "speedup"]
    whole = inference_ratio(evidence, "transformers_eager", "vllm")
    lines = [f"vLLM over transformers eager {whole}, published {printed:.2f}×"]
    for label, before, after in (
        ("static cache and compilation alone", "transformers_eager", "transformers_compiled"),
        ("vLLM's engine and kernels alone", "transformers_eager", "vllm_eager"),
    ):
        try:
            lines.append(f"{label}: {inference_ratio(evidence, before, after)}")
        except Missing as missing:
            lines.append(f"{label}: {missing}")
    return lines


TOPICS = (
    Topic("How much of a published-style speedup is only the removed host synchronisation", "overlap_synchronisation",
          removed_wait),
    Topic("How much of the ideal overlap reaches, without a host in the loop", "overlap_published", share_of_ideal),
    Topic("Where the inference speedup comes from", "inference_attribution", inference),
)  # fmt: skip


def average_sentence(evidence: Evidence, root: pathlib.Path) -> str:
    """The average over the published configurations in both protocols, as the published study's conclusion has it."""
    names = published.numbers(root, "overlap")["configuration"]
    parts = []
    for protocol in ("published", "device"):
        ratios = [overlap_ratio(evidence, name, protocol) for name in names]
        values = [ratio.value for ratio in ratios]
        parts.append(
            f"{sum(values) / len(values):.2f}× on average, {min(values):.2f}–{max(values):.2f}× "
            f"in the {protocol} protocol"
        )
    return "; ".join(parts)
