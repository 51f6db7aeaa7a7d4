"""What of the published study reproduces on one machine, section by section, and why the rest does not."""

import pathlib
from collections.abc import Callable, Sequence

from study.claims.judge import Judgement
from study.claims.measured import all_reduce_row, overlap_ratio
from study.drawing.looks import look
from study.published import tables as published
from study.published.criteria import HIGH_BENEFIT, NOT_REPRODUCED, REPRODUCED, milliseconds
from study.report import techniques
from study.report.findings import methods, with_both
from study.report.found import span
from study.results.evidence import Evidence, Missing

SECTIONS = {
    "overlap": "Section 1, overlap",
    "inference": "Section 2, inference",
    "bandwidth": "Section 3, bandwidth",
    "when_to_overlap": "Section 4, when to overlap",
    "conclusion": "Conclusion",
}


def lines(evidence: Evidence, judgements: Sequence[Judgement], root: pathlib.Path) -> list[str]:
    """A line per published section: how its claims fare, and the reason where some do not hold."""
    result = []
    for section, title in SECTIONS.items():
        mine = [entry for entry in judgements if entry.section == section]
        good = sum(entry.verdict == REPRODUCED for entry in mine)
        bad = sum(entry.verdict == NOT_REPRODUCED for entry in mine)
        rest = len(mine) - good - bad
        text = f"{title}: {good} of {len(mine)} claims reproduced, {bad} not, {rest} not testable here"
        if bad and section != "conclusion":  # what the conclusion rests on is judged above it
            try:
                text += f". Why: {WHY[section](evidence, root) if section in WHY else quoted(mine)}"
            except Missing as missing:
                text += f". Why is not known: {missing}"
        result.append(text)
    return result


def quoted(judgements: Sequence[Judgement]) -> str:
    """The numbers behind the claims that do not hold."""
    return "; ".join(f"“{entry.sentence}”: {entry.numbers}" for entry in judgements if entry.verdict == NOT_REPRODUCED)


def why_overlap(evidence: Evidence, root: pathlib.Path) -> str:
    """How little the ideal leaves to gain, what two streams gain of it, and on GPUs the host's part of the clock."""
    host, device = methods(evidence, root, "published"), methods(evidence, root, "device")
    names = [name for name in with_both(host, "sequential", "two_stream") if (name, "two_stream") in device.index]
    if not names:
        raise Missing("no configuration was finished in both protocols")
    ratios = [overlap_ratio(evidence, name) for name in names]
    undecided = sum(ratio.low <= 1 <= ratio.high for ratio in ratios)
    plain = device.xs("two_stream", level="method").loc[names]
    ideal = plain["t_seq_us"] / plain["ideal_us"]
    gains = [overlap_ratio(evidence, name, "device").value for name in names]
    text = ""
    if evidence.kind == "cuda":
        printed = published.numbers(root, "overlap").set_index("configuration")["t_seq_us"]
        before = {name: host.loc[(name, "sequential"), "t_overlap_us"] for name in names}
        waits = [before[name] - device.loc[(name, "two_stream"), "t_seq_us"] for name in names]
        parts = [wait / before[name] for wait, name in zip(waits, names, strict=True)]
        text = (
            f"one after the other, the work takes {span([before[name] / printed[name] for name in names])} the "
            f"published time, and {min(parts):.0%} to {max(parts):.0%} of it ({milliseconds(min(waits) / 1e3)} to "
            f"{milliseconds(max(waits) / 1e3)}) is the host's issuing and waiting, which differs between launches; "
        )
    return (
        f"{text}over all launches {undecided} of {len(names)} speedups of the published protocol are undecided; "
        f"without the host in the loop the ideal is {span(ideal)} and two streams reach {span(gains)}"
        + fastest_gains(evidence, root)
    )


def fastest_gains(evidence: Evidence, root: pathlib.Path) -> str:
    """What the fastest technique gains there, where more than two streams was measured."""
    groups = techniques.configurations(evidence, root).values()
    if all(len(techniques.overlapped(group)) == 1 for group in groups):
        return ""
    return f", the fastest technique {span([techniques.fastest(group)['speedup'] for group in groups])}"


def why_bandwidth(evidence: Evidence, root: pathlib.Path) -> str:
    """The published rates beside what this machine reaches between and to its devices."""
    numbers = published.numbers(root, "bandwidth").iloc[-1]
    row = all_reduce_row(evidence, int(numbers["bytes"]))
    text = (f"at the largest size the published busbw is {numbers['busbw_gb_per_s']:.3g} GB/s, "
            f"{numbers['busbw_gb_per_s'] / row['busbw_gb_per_s']:.2g} times the {row['busbw_gb_per_s']:.3g} GB/s "
            "measured here")  # fmt: skip
    environment = evidence.table("environment").dropna(subset=["value"])
    best = environment.groupby("quantity")["value"].max()
    if "peer_write" in best and "host_to_device" in best:
        text += (
            f" (peer copies reach {best['peer_write']:.3g} GB/s); it lies below the {best['host_to_device']:.3g} GB/s "
            "of this machine's host link: a rate that a host link (PCIe) can give, far from NVLink's"
            if numbers["busbw_gb_per_s"] < best["host_to_device"]
            else f" (peer copies reach {best['peer_write']:.3g} GB/s)"
        )
    return text


def why_when(evidence: Evidence, root: pathlib.Path) -> str:
    """The models' predicted gain beside the ideal one."""
    rows = evidence.table("model_shares")
    parts = []
    for phase, group in rows.groupby("phase"):
        reached = (group["gain"] >= HIGH_BENEFIT).mean()
        certain = group["verdict"].eq("helps").sum()
        parts.append(
            f"{phase}: median {group['gain'].median():.2f}×, where the ideal is {group['ideal_gain'].median():.2f}×; "
            f"{HIGH_BENEFIT:.2f}× or more in {reached:.0%} of {len(group)} shapes, above 1 beyond the prediction's own "
            f"error in {certain}"
        )
    technique = look(rows["method"].iloc[0]).label
    return f"what the fitted model predicts for a layer by {technique}: {'; '.join(parts)}"


WHY: dict[str, Callable[[Evidence, pathlib.Path], str]] = {
    "overlap": why_overlap,
    "bandwidth": why_bandwidth,
    "when_to_overlap": why_when,
}
