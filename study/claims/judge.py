"""The published study's claims, each judged by one machine's tables; criteria.py says what a verdict means."""

import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from study.claims import measured
from study.drawing.looks import look
from study.published import tables as published
from study.published.criteria import HIGH_BENEFIT, NOT_TESTABLE, RATIO_TOLERANCE, REPRODUCED, Finding, decide
from study.results.evidence import Evidence, Missing


@dataclass(frozen=True)
class Judgement:
    """One published claim on one machine; `numbers` is the sentence of numbers behind the verdict."""

    id: str
    section: str
    sentence: str
    verdict: str
    numbers: str


# -- section 4 and conclusion ----------------------------------------


def gains(evidence: Evidence, chosen: Callable[[pd.DataFrame], pd.Series], what: str) -> pd.DataFrame:
    """The rows of `model_shares` that `chosen` keeps; raises Missing naming `what` when there are none."""
    table = evidence.table("model_shares")
    rows = table[chosen(table)]
    if rows.empty:
        raise Missing(f"the models' table has no {what}")
    return rows


def span(rows: pd.DataFrame, column: str) -> str:
    return f"{rows[column].min():.2f}–{rows[column].max():.2f}×"


def is_high(rows: pd.DataFrame) -> bool:
    return bool(rows["ideal_gain"].median() >= HIGH_BENEFIT and rows["gain"].median() >= HIGH_BENEFIT)


def gains_more(these: pd.DataFrame, those: pd.DataFrame) -> bool:
    return bool(these["gain"].median() > those["gain"].median() * (1 + RATIO_TOLERANCE))


def described(rows: pd.DataFrame) -> str:
    median, decided = rows["gain"].median(), rows["verdict"].eq("helps").sum()
    technique = look(rows["method"].iloc[0]).label
    return (
        f"possible gain {span(rows, 'ideal_gain')}, predicted by {technique} {span(rows, 'gain')} "
        f"(median {median:.2f}×; the prediction's interval lies above 1 at {decided} of {len(rows)})"
    )


def tensor_parallelism(evidence: Evidence, root: pathlib.Path) -> Finding:
    rows = gains(evidence, lambda table: table["tp"] >= 2, "row of tensor parallelism")
    return decide(is_high(rows)), f"over {len(rows)} shapes of the models: {described(rows)}"


def large_models(evidence: Evidence, root: pathlib.Path) -> Finding:
    rows = gains(evidence, lambda table: table["model"].isin(["Qwen3-8B", "Qwen3-32B"]), "model of 7B or more")
    return decide(is_high(rows)), f"Qwen3-8B and 32B: {described(rows)}"


def larger_models_gain_more(evidence: Evidence, root: pathlib.Path) -> Finding:
    small = gains(evidence, lambda table: table["model"] == "Qwen3-0.6B-Base", "small model")
    large = gains(evidence, lambda table: table["model"] == "Qwen3-32B", "large model")
    numbers = f"Qwen3-0.6B: {described(small)}; Qwen3-32B: {described(large)}"
    return decide(gains_more(large, small) and is_high(large)), numbers


def decode_batches(evidence: Evidence, root: pathlib.Path) -> Finding:
    decode = gains(evidence, lambda table: table["phase"] == "decode", "decode row")
    one, most = (decode[decode["batch"] == size] for size in (decode["batch"].min(), decode["batch"].max()))
    numbers = f"batch {one['batch'].iloc[0]}: {described(one)}; batch {most['batch'].iloc[0]}: {described(most)}"
    return decide(is_high(most) and gains_more(most, one)), numbers


def small_models(evidence: Evidence, root: pathlib.Path) -> Finding:
    rows = gains(evidence, lambda table: table["model"] == "Qwen3-0.6B-Base", "small model")
    return decide(not is_high(rows)), f"Qwen3-0.6B: {described(rows)}"


def single_gpu(evidence: Evidence, root: pathlib.Path) -> Finding:
    return NOT_TESTABLE, "a single device has no collective, so there is nothing to overlap and nothing to measure"


def latency_dominated(evidence: Evidence, root: pathlib.Path) -> Finding:
    table = evidence.table("overlap")
    rows = table[(table["protocol"] == "device") & (table["method"] == "two_stream")].dropna(subset=["speedup"])
    if rows.empty:
        raise Missing("no finished two_stream row in the device protocol")
    rows = rows[rows["comm_bytes"] == rows["comm_bytes"].min()]
    numbers = f"two streams at the smallest all-reduce, {rows['comm_bytes'].iloc[0]} bytes: {span(rows, 'speedup')}"
    return decide(rows["speedup"].median() < HIGH_BENEFIT), numbers


def not_built(evidence: Evidence, root: pathlib.Path) -> Finding:
    return NOT_TESTABLE, "needs a tensor-parallel engine with overlap in it, which this study does not measure yet"


def scales_both(evidence: Evidence, root: pathlib.Path) -> Finding:
    findings = [measured.scales(evidence, root), larger_models_gain_more(evidence, root)]
    return decide(all(verdict == REPRODUCED for verdict, _ in findings)), "; ".join(numbers for _, numbers in findings)


JUDGES: dict[str, Callable[[Evidence, pathlib.Path], Finding]] = {
    "overlap_small": measured.one_configuration(measured.SMALL),
    "overlap_medium": measured.one_configuration(measured.MEDIUM),
    "overlap_large": measured.one_configuration(measured.LARGE),
    "overlap_very_large": measured.one_configuration(measured.VERY_LARGE),
    "overlap_average": measured.average,
    "overlap_scales": measured.scales,
    "overlap_best": measured.best_case,
    "overlap_worst": measured.worst_case,
    "inference_baseline": measured.latency("transformers_eager"),
    "inference_vllm": measured.latency("vllm"),
    "inference_speedup": measured.vllm_speedup,
    "inference_cuda_graph": measured.cuda_graphs,
    "inference_paged_attention": measured.paged_attention,
    "inference_continuous_batching": measured.continuous_batching,
    "inference_kernels": measured.kernels,
    "inference_tensor_parallel": tensor_parallelism,
    "inference_integrated": not_built,
    "inference_larger_models": larger_models_gain_more,
    "bandwidth_8": measured.bandwidth_row(0),
    "bandwidth_32": measured.bandwidth_row(1),
    "bandwidth_64": measured.bandwidth_row(2),
    "bandwidth_nvlink": measured.nvlink,
    "when_tensor_parallel": tensor_parallelism,
    "when_large_models": large_models,
    "when_decode": decode_batches,
    "when_single_gpu": single_gpu,
    "when_small_models": small_models,
    "when_latency": latency_dominated,
    "conclusion_validated": measured.validated,
    "conclusion_complementary": not_built,
    "conclusion_scales": scales_both,
}


def judge(evidence: Evidence, root: pathlib.Path) -> list[Judgement]:
    """Every published claim on one machine, in the printed order; without its table a claim is not testable here."""
    judgements = []
    for row in published.printed(root, "claims").itertuples():
        try:
            verdict, numbers = JUDGES[row.id](evidence, root)
        except Missing as missing:
            verdict, numbers = NOT_TESTABLE, str(missing)
        judgements.append(Judgement(row.id, row.section, row.sentence, verdict, numbers))
    return judgements
