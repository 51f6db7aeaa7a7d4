"""Section 2: LLM inference on one device: the published baseline, the published winner, and what lies between them."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import pandas as pd
import pandera.pandas as pa
from pydantic import Field, PositiveInt, field_validator

from study.harness.forecast import is_cpu
from study.harness.machine import Machine
from study.harness.rates import Rates
from study.harness.spec import Dataset, Derived, Point, Section, SectionParameters, smaller
from study.sections.inference.checkpoint import KNOWN_MODELS, check_model, weight_bytes
from study.sections.inference.engines.start import ARMS, BASELINE

WINNER = "vllm"
# Two ways from the published baseline to the published winner: what compilation and graphs give and what the engine and
# its kernels give, each taken first once. Where the two disagree about a cause, its share depends on what came before.
ROUTES = {
    "compilation and graphs first": (BASELINE, "transformers_compiled", WINNER),
    "engine and kernels first": (BASELINE, "vllm_eager", WINNER),
}
STEPS = {
    (BASELINE, "transformers_compiled"): "static cache, torch.compile (on GPUs CUDA graphs)",
    ("transformers_compiled", WINNER): "vLLM's engine, PagedAttention and kernels",
    (BASELINE, "vllm_eager"): "vLLM's engine, PagedAttention and kernels",
    ("vllm_eager", WINNER): "torch.compile (on GPUs CUDA graphs)",
}


# The starts of the engines and the compilation of COMPILED_LAYERS layers, by the time in which the ranks of another
# section start: all are imports and Python, whose speed is the machine's. By launches on 2 cores and on 2 H200s.
STARTS = {
    "cpu": {"transformers_eager": (3, 0), "transformers_compiled": (6, 11), "vllm_eager": (11, 0), "vllm": (11, 16)},
    "cuda": {"transformers_eager": (1.5, 0), "transformers_compiled": (2, 7), "vllm_eager": (6, 0), "vllm": (6, 13)},
}
COMPILED_LAYERS = 28
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Of a model that nothing is known of, for forecasts.
UNKNOWN_WEIGHT_BYTES = 2e9


class InferenceParameters(SectionParameters):
    num_launches: int = Field(1, ge=1, description="separate process launches per point; rows are medians over them")
    model: str = Field(
        "Qwen3-0.6B-Base",
        description="a checkpoint folder or a hub name; random weights of its dimensions where the hub is out of reach",
    )
    arms: list[Literal[ARMS]] = Field(list(ARMS), min_length=1, description="engines to compare")
    batches: list[PositiveInt] = Field([1, 8, 32], min_length=1, description="numbers of requests decoded together")
    prompt_tokens: int = Field(6, ge=1, le=16384, description="tokens of each prompt; the published prompt has 6")
    new_tokens: int = Field(32, ge=1, le=16384, description="tokens generated for each request, exactly")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="type of weights and activations")
    num_warmups: int = Field(3, ge=1, description="untimed generations before each batch size")
    num_repeats: int = Field(10, ge=1, description="timed generations at batch 1")
    num_batched_repeats: int = Field(6, ge=1, description="timed generations at every other batch size")

    @field_validator("model")
    @classmethod
    def model_exists(cls, model: str) -> str:
        check_model(model)
        return model


def points(parameters: InferenceParameters, machine: Machine) -> list[Point]:
    """Arm by arm, because each is a process of its own; raises ValueError when the weights alone exceed the memory."""
    weights = weight_bytes(parameters.model)
    # On a CPU the float32 reference lies in the same memory.
    needed = (weights or 0) * BYTES[parameters.dtype] // 2
    needed += 2 * (weights or 0) if machine.kind == "cpu" else 0
    if needed > machine.memory_bytes:
        raise ValueError(f"model = {parameters.model!r} needs {needed / 1e9:.0f} GB for its weights alone, "
                         f"and {machine.name} has {machine.memory_bytes / 1e9:.0f} GB")  # fmt: skip
    return [
        {
            "arm": arm, "batch": batch, "prompt_tokens": parameters.prompt_tokens, "new_tokens": parameters.new_tokens,
            "model": parameters.model, "dtype": parameters.dtype, "num_warmups": parameters.num_warmups,
            "num_repeats": parameters.num_repeats if batch == 1 else parameters.num_batched_repeats,
        }
        for arm in parameters.arms
        for batch in sorted(parameters.batches)
    ]  # fmt: skip


def seconds(point: Point, rates: Rates) -> float:
    """Of one batch of one arm: a step reads all weights and multiplies with each; engines reach some half of either."""
    parameters_ = (weight_bytes(point["model"]) or UNKNOWN_WEIGHT_BYTES) / 2
    devices = rates.num_ranks if is_cpu(rates) else 1  # on a CPU one engine has the cores of all ranks
    read_s = 1.5 * parameters_ * BYTES[point["dtype"]] / (devices * rates.copy_bytes_per_s)
    multiplied_s = 2.5 * rates.matmul_s(point["batch"], parameters_, 1, rates.named(point["dtype"], DTYPES)) / devices
    tokens = point["new_tokens"] + point["prompt_tokens"] // 8
    generations = point["num_warmups"] + point["num_repeats"]
    checked = rates.matmul_s(4 * (point["prompt_tokens"] + point["new_tokens"]), parameters_, 1, "fp32") / devices
    return 2.0 + generations * tokens * (0.003 + read_s + multiplied_s) + checked


def start_s(point: Point, rates: Rates) -> float:
    known = KNOWN_MODELS.get(point["model"].rpartition("/")[2])
    layers = known.layers if known else COMPILED_LAYERS
    starting, compiling = STARTS["cpu" if is_cpu(rates) else "cuda"][point["arm"]]
    return (1 + starting + compiling * layers / COMPILED_LAYERS) * rates.start_s


def unavailable(parameters: InferenceParameters, machine: Machine) -> str | None:
    """Without transformers there is neither baseline nor reference. Without vLLM only its arms fail, and their rows
    say so."""
    absent = [name for name in ("torch", "transformers") if find_spec(name) is None]
    return f"{' and '.join(absent)} cannot be imported in this environment" if absent else None


def compare(rows: pd.DataFrame) -> pd.DataFrame:
    """Add what needs two arms: `speedup` over transformers eager at the same batch and checkpoint, with an interval
    made of both arms' interval ends (so wider than 95 %), and `tokens_equal_to_baseline`: how many of the first
    request's leading tokens are the baseline's. NaN where the baseline has no result."""
    by = ["batch", "prompt_tokens", "new_tokens", "model", "dtype", "checkpoint"]
    columns = ["e2e_ms", "e2e_lo_ms", "e2e_hi_ms", "first_tokens"]
    baseline = rows.loc[rows["arm"] == BASELINE, [*by, *columns]].drop_duplicates(by)
    both = rows[[*by, *columns]].merge(baseline, on=by, how="left", suffixes=("", "_of_baseline"))
    equal = [
        np.nan if not ours or not isinstance(theirs, str) or not theirs else leading_equal(ours.split(), theirs.split())
        for ours, theirs in zip(both["first_tokens"], both["first_tokens_of_baseline"], strict=True)
    ]
    itself = (rows["arm"] == BASELINE).to_numpy() & both["e2e_ms"].notna().to_numpy()
    return rows.assign(
        speedup=(both["e2e_ms_of_baseline"] / both["e2e_ms"]).to_numpy(),
        speedup_lo=np.where(itself, 1.0, both["e2e_lo_ms_of_baseline"] / both["e2e_hi_ms"]),
        speedup_hi=np.where(itself, 1.0, both["e2e_hi_ms_of_baseline"] / both["e2e_lo_ms"]),
        tokens_equal_to_baseline=np.asarray(equal, dtype=float),
    )


def leading_equal(ours: list[str], theirs: list[str]) -> int:
    pairs = list(zip(ours, theirs, strict=False))
    return next((place for place, (our, their) in enumerate(pairs) if our != their), len(pairs))


def attribute(tables: Mapping[str, pd.DataFrame], parameters: Any) -> pd.DataFrame:
    """Each route's steps at each batch: `factor` = E2E before / after, and `log_share`, its part of the route's whole
    factor on a logarithmic scale, so that the shares of a route add up to 1. A step between arms of which one failed
    is left out.

    The interval of `factor` is made of the ends of both arms' intervals, so it covers more than 95 %.
    """
    rows = tables["inference"]
    rows = rows[rows["correct"]]
    steps = []
    for batch, arms in rows.groupby("batch"):
        arms = arms.set_index("arm")
        for route, names in ROUTES.items():
            has_both_ends = {BASELINE, WINNER} <= set(arms.index)
            whole = arms.at[BASELINE, "e2e_ms"] / arms.at[WINNER, "e2e_ms"] if has_both_ends else np.nan
            for number, (source, target) in enumerate(zip(names, names[1:], strict=False), 1):
                if source not in arms.index or target not in arms.index:
                    continue
                before, after = arms.loc[source], arms.loc[target]
                factor = before["e2e_ms"] / after["e2e_ms"]
                steps.append({
                    "route": route, "batch": batch, "step": number, "adds": STEPS[source, target],
                    "from_arm": source, "to_arm": target,
                    "e2e_before_ms": before["e2e_ms"], "e2e_after_ms": after["e2e_ms"],
                    "factor": factor, "factor_lo": before["e2e_lo_ms"] / after["e2e_hi_ms"],
                    "factor_hi": before["e2e_hi_ms"] / after["e2e_lo_ms"],
                    "ttft_factor": before["ttft_ms"] / after["ttft_ms"],
                    "tpot_factor": before["tpot_ms"] / after["tpot_ms"], "log_share": np.log(factor) / np.log(whole),
                })  # fmt: skip
    return pd.DataFrame(steps, columns=list(ATTRIBUTION_SCHEMA.columns))


POSITIVE = pa.Check.gt(0)
TIMES = ("e2e_ms", "e2e_lo_ms", "e2e_hi_ms", "ttft_ms", "tpot_ms")
SCHEMA = pa.DataFrameSchema(
    {
        "point_key": pa.Column(str),
        "arm": pa.Column(str, pa.Check.isin(ARMS)),
        "batch": pa.Column(int, pa.Check.ge(1)),
        "prompt_tokens": pa.Column(int, pa.Check.ge(1)),
        "new_tokens": pa.Column(int, pa.Check.ge(1)),
        "model": pa.Column(str),
        "dtype": pa.Column(str),
        **{name: pa.Column(float, POSITIVE, nullable=True) for name in TIMES},
        "tokens_per_s": pa.Column(float, POSITIVE, nullable=True),
        "speedup": pa.Column(float, POSITIVE, nullable=True),
        "speedup_lo": pa.Column(float, POSITIVE, nullable=True),
        "speedup_hi": pa.Column(float, POSITIVE, nullable=True),
        "start_s": pa.Column(float, POSITIVE, nullable=True),
        "weights": pa.Column(str, pa.Check.isin(["local", "hub", "random", ""])),
        "checkpoint": pa.Column(str),
        "parameters_millions": pa.Column(float, POSITIVE, nullable=True),
        "engine": pa.Column(str),
        "threads": pa.Column(int, pa.Check.ge(0)),
        "first_tokens": pa.Column(str),
        "tokens_equal_to_baseline": pa.Column(float, pa.Check.ge(0), nullable=True),
        "reference_gap": pa.Column(float, pa.Check.ge(0), nullable=True),
        "correct": pa.Column(bool),
        "error": pa.Column(str),
        "num_launches": pa.Column(int, pa.Check.ge(1)),
    },
    checks=pa.Check(
        lambda rows: rows["e2e_ms"].notna() == rows["correct"],
        name="a correct arm has a time, a failed one has none",
    ),
    strict=False,
    coerce=True,
)
ATTRIBUTION_SCHEMA = pa.DataFrameSchema(
    {
        "route": pa.Column(str, pa.Check.isin(list(ROUTES))),
        "batch": pa.Column(int, pa.Check.ge(1)),
        "step": pa.Column(int, pa.Check.ge(1)),
        "adds": pa.Column(str),
        "from_arm": pa.Column(str, pa.Check.isin(ARMS)),
        "to_arm": pa.Column(str, pa.Check.isin(ARMS)),
        "e2e_before_ms": pa.Column(float, POSITIVE),
        "e2e_after_ms": pa.Column(float, POSITIVE),
        "factor": pa.Column(float, POSITIVE),
        "factor_lo": pa.Column(float, POSITIVE),
        "factor_hi": pa.Column(float, POSITIVE),
        "ttft_factor": pa.Column(float, POSITIVE),
        "tpot_factor": pa.Column(float, POSITIVE, nullable=True),
        "log_share": pa.Column(float, nullable=True),
    },
    strict=False,
    coerce=True,
)

INFERENCE = Dataset(
    name="inference",
    program="study.sections.inference.measure",
    method_version=1,
    schema=SCHEMA,
    index=("arm", "batch", "prompt_tokens", "new_tokens", "model", "dtype"),
    points=points,
    num_ranks=lambda parameters, machine: 1,
    unavailable=unavailable,
    group=lambda point: (point["arm"],),
    finish=compare,
    seconds=seconds,
    start_s=start_s,
)
ATTRIBUTION = Derived(
    name="inference_attribution",
    method_version=1,
    schema=ATTRIBUTION_SCHEMA,
    index=("route", "batch", "step"),
    inputs=("inference",),
    compute=attribute,
)

TINY = {
    "model": "Qwen3-tiny", "batches": [1, 2], "new_tokens": 8,
    "num_warmups": 1, "num_repeats": 3, "num_batched_repeats": 2,
}  # fmt: skip
FEWEST = {"arms": [BASELINE, "vllm_eager"], "batches": [1]}
SECTION = Section(
    name="inference",
    title="2. LLM inference",
    notebook="02_inference.ipynb",
    parameters=InferenceParameters,
    profiles={
        # What takes time is to start the engines: the fewer left still hold a whole route, or a step of one.
        "smoke": {
            "cpu": smaller(TINY, {"arms": [arm for arm in ARMS if arm != "vllm_eager"]}, FEWEST),
            "cuda": smaller(TINY, FEWEST),
        },
        "standard": {
            "cpu": smaller(
                {"num_warmups": 1, "num_repeats": 6, "num_batched_repeats": 2},
                {"batches": [1, 8], "num_repeats": 5},
                {"batches": [1, 4], "num_repeats": 4, "new_tokens": 16},
                {"batches": [1], "num_repeats": 3},
                {**TINY, "batches": [1, 8], "new_tokens": 32},
            ),
            "cuda": smaller(
                {}, {"batches": [1, 8], "num_repeats": 5, "num_warmups": 1, "num_batched_repeats": 3}, TINY
            ),
        },
        "full": {"cpu": [{}], "cuda": [{"batches": [1, 8, 32, 128], "num_batched_repeats": 4}]},
    },
    share={"cpu": 0.61, "cuda": 0.525},
    dtypes=DTYPES,
    datasets=(INFERENCE,),
    derived=(ATTRIBUTION,),
)
