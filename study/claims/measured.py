"""Claims of the published sections 1 to 3, judged by measured tables: each function gives a verdict and its numbers."""

import pathlib
from collections.abc import Callable

import pandas as pd

from study.drawing.style import digits
from study.published import tables as published
from study.published.criteria import (
    BANDWIDTH_TOLERANCE,
    NOT_TESTABLE,
    NVLINK_SHARE,
    REPRODUCED,
    Finding,
    Ratio,
    decide,
    milliseconds,
    reaches,
)
from study.results.evidence import Evidence, Missing

PUBLISHED_MODEL, PUBLISHED_NEW_TOKENS = "Qwen3-0.6B", 32
SMALL, MEDIUM, LARGE, VERY_LARGE = (
    "Small compute, medium comm",
    "Medium compute, large comm",
    "Large compute, large comm",
    "Large compute, very large comm",
)  # fmt: skip


# -- section 1 ----------------------------------------


def overlap_ratio(
    evidence: Evidence, configuration: str, protocol: str = "published", method: str = "two_stream"
) -> Ratio:
    """The measured speedup of one published configuration at the published sizes; raises Missing if there is none."""
    table = evidence.table("overlap")
    rows = table[
        (table["configuration"] == configuration) & (table["protocol"] == protocol) & (table["method"] == method)
    ]
    rows = rows.dropna(subset=["t_overlap_us"])
    if rows.empty:
        raise Missing(f"“{configuration}” has no finished {method} in the {protocol} protocol")
    row = rows.iloc[0]
    times = f"{milliseconds(row['t_seq_us'] / 1e3)} → {milliseconds(row['t_overlap_us'] / 1e3)}"
    return Ratio(row["speedup"], row["speedup_lo"], row["speedup_hi"], times)


def at_published_sizes(evidence: Evidence, root: pathlib.Path) -> dict[str, float]:
    """The printed speedups by configuration; raises Missing if this machine measured one of them at other sizes."""
    table = evidence.table("overlap")
    for row in published.numbers(root, "overlap").itertuples():
        mine = table[table["configuration"] == row.configuration]
        other = mine[(mine["comm_bytes"] != row.comm_bytes) | (mine["matmul_n"] != row.matmul_n)]
        if len(mine) and len(other):
            sizes = f"{other['comm_bytes'].iloc[0]} bytes and n = {other['matmul_n'].iloc[0]}"
            raise Missing(f"“{row.configuration}” was measured at other sizes here: {sizes}")
    return published.numbers(root, "overlap").set_index("configuration")["speedup"].to_dict()


def doubt(ratio: Ratio) -> str:
    """For behind a ratio's numbers: a verdict "not reproduced" then says no more than that it was not shown."""
    return " (the interval leaves it undecided)" if ratio.low < 1 < ratio.high else ""


def one_configuration(configuration: str) -> Callable[[Evidence, pathlib.Path], Finding]:
    def judge(evidence: Evidence, root: pathlib.Path) -> Finding:
        printed = at_published_sizes(evidence, root)[configuration]
        ratio = overlap_ratio(evidence, configuration)
        numbers = f"{ratio} in the published protocol{doubt(ratio)}, printed {printed:.2f}×"
        try:
            numbers += f"; {overlap_ratio(evidence, configuration, 'device')} in the device protocol"
        except Missing as missing:
            numbers += f"; device protocol: {missing}"
        return decide(reaches(ratio, printed)), numbers

    return judge


def all_four(evidence: Evidence, root: pathlib.Path) -> dict[str, Ratio]:
    return {name: overlap_ratio(evidence, name) for name in at_published_sizes(evidence, root)}


def average(evidence: Evidence, root: pathlib.Path) -> Finding:
    ratios = list(all_four(evidence, root).values())
    value, low, high = (sum(getattr(ratio, end) for ratio in ratios) / len(ratios) for end in ("value", "low", "high"))
    claims = published.printed(root, "claims").set_index("id")
    printed = published.number(claims.loc["overlap_average", "sentence"])
    numbers = f"average {value:.2f}× [{low:.2f}, {high:.2f}] of {', '.join(f'{ratio.value:.2f}×' for ratio in ratios)}"
    mean = Ratio(value, low, high, "")
    return decide(reaches(mean, printed)), f"{numbers}{doubt(mean)}; printed {printed:.2f}×"


def scales(evidence: Evidence, root: pathlib.Path) -> Finding:
    ratios = all_four(evidence, root)
    larger = min((ratios[name] for name in (LARGE, VERY_LARGE)), key=lambda ratio: ratio.low)
    smaller = max((ratios[name] for name in (SMALL, MEDIUM)), key=lambda ratio: ratio.high)
    numbers = (
        f"of the two larger matmuls the less certain gains {larger.value:.2f}× [{larger.low:.2f}, {larger.high:.2f}], "
        f"of the two smaller {smaller.value:.2f}× [{smaller.low:.2f}, {smaller.high:.2f}]"
    )
    return decide(larger.low > smaller.high), numbers


def best_case(evidence: Evidence, root: pathlib.Path) -> Finding:
    printed = at_published_sizes(evidence, root)[LARGE]
    ratios = all_four(evidence, root)
    best = max(ratios, key=lambda name: ratios[name].value)
    holds = best in (LARGE, VERY_LARGE) and reaches(ratios[best], printed)
    return decide(holds), f"best: {ratios[best]} for “{best}”{doubt(ratios[best])}; printed {printed:.2f}×"


def worst_case(evidence: Evidence, root: pathlib.Path) -> Finding:
    printed = at_published_sizes(evidence, root)[SMALL]
    ratios = all_four(evidence, root)
    worst = min(ratios, key=lambda name: ratios[name].value)
    numbers = f"worst: {ratios[worst]} for “{worst}”{doubt(ratios[worst])}; printed {printed:.2f}×"
    return decide(reaches(ratios[worst], printed)), numbers


def validated(evidence: Evidence, root: pathlib.Path) -> Finding:
    verdicts = [average(evidence, root), best_case(evidence, root)]
    return decide(all(verdict == REPRODUCED for verdict, _ in verdicts)), "; ".join(numbers for _, numbers in verdicts)


# -- section 2 ----------------------------------------


def inference_row(evidence: Evidence, arm: str, batch: int = 1) -> pd.Series:
    """The finished row of one arm; raises Missing if there is none, or if it is not the published model and length."""
    table = evidence.table("inference")
    if arm not in set(table["arm"]):
        raise Missing(f"arm {arm} was not measured")
    rows = table[(table["arm"] == arm) & (table["batch"] == batch)].dropna(subset=["e2e_ms"])
    if rows.empty:
        raise Missing(f"arm {arm} has no finished row of batch {batch}")
    row = rows.iloc[0]
    if PUBLISHED_MODEL not in row["model"] or row["new_tokens"] != PUBLISHED_NEW_TOKENS:
        raise Missing(f"measured with {row['model']} and {row['new_tokens']} new tokens here, not as published")
    return row


def inference_ratio(evidence: Evidence, slower: str, faster: str, batch: int = 1) -> Ratio:
    """E2E of one arm over another's; its interval from the ends of both intervals, so rather too wide."""
    a, b = inference_row(evidence, slower, batch), inference_row(evidence, faster, batch)
    times = f"{milliseconds(a['e2e_ms'])} → {milliseconds(b['e2e_ms'])}"
    low, high = a["e2e_lo_ms"] / b["e2e_hi_ms"], a["e2e_hi_ms"] / b["e2e_lo_ms"]
    return Ratio(a["e2e_ms"] / b["e2e_ms"], low, high, times)


def latency(arm: str) -> Callable[[Evidence, pathlib.Path], Finding]:
    def judge(evidence: Evidence, root: pathlib.Path) -> Finding:
        row = inference_row(evidence, arm)
        printed = published.numbers(root, "inference").set_index("arm").loc[arm]
        return NOT_TESTABLE, (
            f"a latency of other hardware is compared, not judged: {milliseconds(row['e2e_ms'])} "
            f"[{milliseconds(row['e2e_lo_ms'])}, {milliseconds(row['e2e_hi_ms'])}] and "
            f"{digits(row['tokens_per_s'])} tokens/s here, printed "
            f"{milliseconds(printed['e2e_ms'])} and {digits(printed['tokens_per_s'])} tokens/s"
        )

    return judge


def vllm_speedup(evidence: Evidence, root: pathlib.Path) -> Finding:
    printed = published.numbers(root, "inference").set_index("arm").loc["vllm", "speedup"]
    ratio = inference_ratio(evidence, "transformers_eager", "vllm")
    return decide(reaches(ratio, printed)), f"{ratio}, printed {printed:.2f}×"


def cuda_graphs(evidence: Evidence, root: pathlib.Path) -> Finding:
    ratio = inference_ratio(evidence, "vllm_eager", "vllm")
    if evidence.kind != "cuda":
        return NOT_TESTABLE, f"no CUDA graphs on a CPU; compilation alone gives vLLM {ratio}"
    return decide(ratio.low > 1), f"compilation and CUDA graphs together give vLLM {ratio}"


def kernels(evidence: Evidence, root: pathlib.Path) -> Finding:
    ratio = inference_ratio(evidence, "transformers_eager", "vllm_eager")
    return NOT_TESTABLE, f"no arm has them alone; engine, PagedAttention and kernels together give {ratio}"


def paged_attention(evidence: Evidence, root: pathlib.Path) -> Finding:
    ratio = inference_ratio(evidence, "transformers_eager", "vllm_eager")
    return NOT_TESTABLE, f"no arm switches it off; engine, PagedAttention and kernels together give {ratio}"


def continuous_batching(evidence: Evidence, root: pathlib.Path) -> Finding:
    single = inference_ratio(evidence, "transformers_eager", "vllm")
    largest = int(evidence.table("inference")["batch"].max())
    many = inference_ratio(evidence, "transformers_eager", "vllm", largest)
    return NOT_TESTABLE, (
        f"the published test has one request, so nothing is batched in it: {single}; "
        f"{largest} requests that start together: {many}"
    )


# -- section 3 ----------------------------------------


def all_reduce_row(evidence: Evidence, num_bytes: int) -> pd.Series:
    """The default backend's all-reduce of one size: NCCL on GPUs, gloo on a CPU."""
    backend = {"cuda": "nccl", "cpu": "gloo"}[evidence.kind]
    table = evidence.table("bandwidth")
    rows = table[(table["collective"] == "all_reduce") & (table["backend"] == backend)]
    rows = rows[published.same_size(rows["bytes"], num_bytes)].dropna(subset=["time_us"])
    if rows.empty:
        raise Missing(f"no finished {backend} all-reduce of {num_bytes} bytes")
    return rows.iloc[0]


def bandwidth_row(place: int) -> Callable[[Evidence, pathlib.Path], Finding]:
    def judge(evidence: Evidence, root: pathlib.Path) -> Finding:
        printed = published.numbers(root, "bandwidth").iloc[place]
        row = all_reduce_row(evidence, int(printed["bytes"]))
        value, low, high = (2e-3 * row["bytes"] / row[f"time_{end}us"] for end in ("", "hi_", "lo_"))
        target = printed["effective_gb_per_s"]
        holds = low <= target * (1 + BANDWIDTH_TOLERANCE) and high >= target * (1 - BANDWIDTH_TOLERANCE)
        return decide(holds), (
            f"{row['backend']}: {milliseconds(row['time_us'] / 1e3)}, 2 S / t = {value:.3g} [{low:.3g}, {high:.3g}] "
            f"GB/s, busbw {row['busbw_gb_per_s']:.3g} GB/s; printed ~{target:.3g} GB/s"
        )

    return judge


def nvlink(evidence: Evidence, root: pathlib.Path) -> Finding:
    environment = evidence.table("environment")
    limit = environment.loc[environment["quantity"] == "link_limit", "value"]
    printed = published.numbers(root, "bandwidth").iloc[-1]
    row = all_reduce_row(evidence, int(printed["bytes"]))
    if limit.empty or evidence.description.get("link") != "NVLink":
        raise Missing(
            f"this machine has no NVLink of known speed; its own busbw at that size is {row['busbw_gb_per_s']:.3g} GB/s"
        )
    share = printed["busbw_gb_per_s"] / row["busbw_gb_per_s"]
    return decide(share >= NVLINK_SHARE), (
        f"the printed ~{printed['effective_gb_per_s']:.3g} GB/s is 2 S / t: a busbw of "
        f"{printed['busbw_gb_per_s']:.3g} GB/s at their two ranks, {share:.0%} of the "
        f"{row['busbw_gb_per_s']:.3g} GB/s measured here over NVLink and "
        f"{printed['busbw_gb_per_s'] / limit.iloc[0]:.0%} of the link's {limit.iloc[0]:.3g} GB/s"
    )
