"""Section 4: where overlapping pays, from what sections 0, 1 and 3 measured; nothing is measured here."""

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd
import pandera.pandas as pa
from pydantic import Field

from study.costs import AllReduceCost, MatmulCost
from study.harness.spec import Derived, Section, SectionParameters
from study.harness.stats import verdict
from study.layers import ALL_REDUCES_PER_LAYER, layer_times_us
from study.models import MODELS
from study.sections.when_to_overlap import model

MIN_SHAPES = 4
VERDICTS = ["helps", "hurts", "undecided"]
# A fit has as many parameters as the fewest points that give one.
NUM_PARAMETERS = model.MIN_TRAINING_POINTS


class WhenParameters(SectionParameters):
    method: str = Field("two_stream", description="technique whose stretch predicts the gain of the models' layers")
    dtype: str = Field("bf16", pattern="^(bf16|fp16|fp32)$", description="type of the models' weights and activations")
    tp: list[int] = Field([2, 4], min_length=1, description="tensor-parallel sizes of the models' table")
    decode_batches: list[int] = Field([2**i for i in range(9)], description="sequences decoded together, a token each")
    prefill_tokens: list[int] = Field([2**i * 1024 for i in range(5)], description="tokens of a prefill")


def stretch_of(rows: pd.DataFrame) -> model.Stretch:
    """The fit to rows of the table `overlap` (or of this section's: the columns t_comm_us, t_comp_us, t_overlap_us)."""
    return model.fit(rows["t_comm_us"], rows["t_comp_us"], rows["t_overlap_us"])


def overlapped_rows(overlap: pd.DataFrame) -> pd.DataFrame:
    """The rows that overlapping is judged on: device protocol, correct, not sequential; `shape` names the point.

    The planner's are left out: it runs now one technique, now another, so no stretch is its own. Raises ValueError when
    there are none.
    """
    sequential = overlap["method"].str.startswith("sequential") | overlap["method"].eq("auto")
    times = overlap[["t_comm_us", "t_comp_us", "t_overlap_us", "t_seq_us"]].gt(0).all(axis=1)
    rows = overlap[overlap["protocol"].eq("device") & ~sequential & overlap["correct"] & times]
    if rows.empty:
        raise ValueError(
            "table overlap has no correct row of an overlapping method in protocol 'device'; "
            "measure it with: python -m study run --only overlap --force"
        )
    return rows.assign(shape=rows["comm_bytes"].astype(str) + " B, n = " + rows["matmul_n"].astype(str))


def when_to_overlap(tables: Mapping[str, pd.DataFrame], parameters: WhenParameters) -> pd.DataFrame:
    """Predicted beside measured overlapped times, one row per measured point and technique.

    Every technique has its own fit, on the shapes that are not held out; one measured at fewer than 4 shapes is left
    out. `error` = predicted / measured − 1; `new_n_error` is the same with a fit that has seen no point of that
    `matmul_n`. Verdicts weigh the interval against the measured sequential time. Raises ValueError if no technique has
    enough shapes.
    """
    rows = overlapped_rows(tables["overlap"])
    parts = []
    for _, group in rows.groupby("method", sort=False):
        if group["shape"].nunique() >= MIN_SHAPES:
            kept_out = group["shape"].isin(model.held_out(group["shape"]))
            parts.append(judged(group, stretch_of(group[~kept_out]), kept_out))
    if not parts:
        most = rows.groupby("method")["shape"].nunique().max()
        raise ValueError(
            f"table overlap has at most {most} shapes of a method in protocol 'device', {MIN_SHAPES} are needed to fit "
            "and judge the model; measure more with the parameters configurations and sweep_* of section overlap"
        )
    return pd.concat(parts, ignore_index=True)


def judged(group: pd.DataFrame, stretch: model.Stretch, kept_out: pd.Series) -> pd.DataFrame:
    """The reported rows of one technique."""
    measured, seq = group["t_overlap_us"], group["t_seq_us"]
    comm, comp = group["t_comm_us"], group["t_comp_us"]
    predicted, (low, high) = stretch.predict(comm, comp), stretch.interval(comm, comp)
    names = ("point_key", "configuration", "comm_bytes", "matmul_n", "protocol", "method", "backend", "num_launches")
    return pd.DataFrame({
        **{name: group[name] for name in names},
        "held_out": kept_out,
        "t_comm_us": comm, "t_comp_us": comp, "t_seq_us": seq, "ideal_us": group["ideal_us"],
        "measured_us": measured, "measured_lo_us": group["t_overlap_lo_us"], "measured_hi_us": group["t_overlap_hi_us"],
        "predicted_us": predicted, "predicted_lo_us": low, "predicted_hi_us": high,
        "error": predicted / measured - 1,
        "new_n_error": new_n_prediction(group) / measured - 1,
        "verdict": list(map(verdict, seq / high, seq / low)),
        "measured_verdict": list(map(verdict, group["speedup_lo"], group["speedup_hi"])),
        "sigma_comm": stretch.sigma_comm, "sigma_comp": stretch.sigma_comp, "delta_us": stretch.delta,
        "spread": stretch.spread, "num_training": int((~kept_out).sum()),
    })  # fmt: skip


def new_n_prediction(group: pd.DataFrame) -> pd.Series:
    """Overlapped times in µs, each by a fit without the points of the same matmul size; NaN where too few are left."""
    result = pd.Series(np.nan, index=group.index)
    for n, same in group.groupby("matmul_n"):
        others = group[group["matmul_n"] != n]
        if len(others) >= model.MIN_TRAINING_POINTS:
            result[same.index] = stretch_of(others).predict(same["t_comm_us"], same["t_comp_us"])
    return result


def fitted(when: pd.DataFrame, method: str) -> model.Stretch:
    """The stretch of `method` in the table `when_to_overlap`; raises ValueError naming the methods it has."""
    rows = when[when["method"] == method]
    if rows.empty:
        raise ValueError(
            f"method {method!r} was not measured; measured are {', '.join(sorted(when['method'].unique()))}"
        )
    first = rows.iloc[0]
    return model.Stretch(first["sigma_comm"], first["sigma_comp"], first["delta_us"], first["spread"])


def testable(num_training: int) -> bool:
    """Whether a fit to so many points can miss them; to as many as it has parameters it meets whatever they are."""
    return num_training > NUM_PARAMETERS


def backend_of(when: pd.DataFrame, method: str) -> str:
    """The backend whose all-reduce `method` ran."""
    return when.loc[when["method"] == method, "backend"].iloc[0]


def model_shares(tables: Mapping[str, pd.DataFrame], parameters: WhenParameters) -> pd.DataFrame:
    """Communication's share of a layer and what overlapping it could give, per model, tp, phase and token count.

    `gain` is sequential / predicted overlapped time with the fitted stretch of `parameters.method`, as if every matmul
    of the layer could hide its all-reduces: an upper bound of what a technique with those stretches can give. Rows at a
    tp that was not measured, or of fewer or more bytes than were, are marked `extrapolated`.
    """
    stretch = fitted(tables["when_to_overlap"], parameters.method)
    backend = backend_of(tables["when_to_overlap"], parameters.method)
    all_reduce = AllReduceCost.from_bandwidth(tables["bandwidth"], backend)
    matmul = MatmulCost.from_environment(tables["environment"], parameters.dtype)
    work = [("decode", batch, batch) for batch in parameters.decode_batches]
    work += [("prefill", 1, tokens) for tokens in parameters.prefill_tokens]
    result = []
    for dimensions, tp, (phase, batch, tokens) in itertools.product(MODELS.values(), parameters.tp, work):
        t_comm, t_comp = layer_times_us(dimensions, tokens, tp, matmul, all_reduce)
        covered = all_reduce.covers(tokens * dimensions.hidden * matmul.element_bytes, tp)
        result.append({
            "model": dimensions.name, "tp": tp, "phase": phase, "batch": batch, "tokens": tokens,
            "method": parameters.method, "backend": backend, "t_matmul_us": t_comp, "t_comm_us": t_comm,
            **model.gain(t_comm, t_comp, stretch, ALL_REDUCES_PER_LAYER),
            "extrapolated": tp != all_reduce.ranks or not covered,
            "matmul_error": matmul.error, "all_reduce_error": all_reduce.curve.left_out_error(),
        })  # fmt: skip
    return pd.DataFrame(result)


def positive(nullable: bool = False) -> pa.Column:
    return pa.Column(float, pa.Check.gt(0), nullable=nullable)


WHEN_TO_OVERLAP = Derived(
    name="when_to_overlap",
    method_version=1,
    schema=pa.DataFrameSchema(
        {
            "point_key": pa.Column(str),
            "configuration": pa.Column(str),
            "comm_bytes": pa.Column(int, pa.Check.gt(0)),
            "matmul_n": pa.Column(int, pa.Check.gt(0)),
            "protocol": pa.Column(str, pa.Check.eq("device")),
            "method": pa.Column(str),
            "backend": pa.Column(str),
            "num_launches": pa.Column(int, pa.Check.ge(1)),
            "held_out": pa.Column(bool),
            **{
                f"{name}_us": positive()
                for name in (
                    "t_comm",
                    "t_comp",
                    "t_seq",
                    "ideal",
                    "measured",
                    "measured_lo",
                    "measured_hi",
                    "predicted",
                    "predicted_lo",
                    "predicted_hi",
                )
            },
            "error": pa.Column(float, pa.Check.gt(-1)),
            "new_n_error": pa.Column(float, pa.Check.gt(-1), nullable=True),
            "verdict": pa.Column(str, pa.Check.isin(VERDICTS)),
            "measured_verdict": pa.Column(str, pa.Check.isin(VERDICTS)),
            "sigma_comm": pa.Column(float, pa.Check.ge(1)),
            "sigma_comp": pa.Column(float, pa.Check.ge(1)),
            "delta_us": pa.Column(float, pa.Check.ge(0)),
            "spread": pa.Column(float, pa.Check.ge(0)),
            "num_training": pa.Column(int, pa.Check.ge(model.MIN_TRAINING_POINTS)),
        },
        strict=False,
        coerce=True,
    ),
    index=("point_key", "method"),
    inputs=("overlap",),
    compute=when_to_overlap,
)

MODEL_SHARES = Derived(
    name="model_shares",
    method_version=2,
    schema=pa.DataFrameSchema(
        {
            "model": pa.Column(str),
            "tp": pa.Column(int, pa.Check.ge(2)),
            "phase": pa.Column(str, pa.Check.isin(["decode", "prefill"])),
            "batch": pa.Column(int, pa.Check.ge(1)),
            "tokens": pa.Column(int, pa.Check.ge(1)),
            "method": pa.Column(str),
            "backend": pa.Column(str),
            "t_matmul_us": positive(),
            "t_comm_us": positive(),
            "comm_share": pa.Column(float, pa.Check.in_range(0, 1)),
            "ideal_gain": pa.Column(float, pa.Check.in_range(1, 2)),
            "gain": positive(),
            "gain_lo": positive(),
            "gain_hi": positive(),
            "verdict": pa.Column(str, pa.Check.isin(VERDICTS)),
            "extrapolated": pa.Column(bool),
            "matmul_error": pa.Column(float, nullable=True),
            "all_reduce_error": pa.Column(float, nullable=True),
        },
        strict=False,
        coerce=True,
    ),
    index=("model", "tp", "phase", "batch", "tokens", "method"),
    inputs=("when_to_overlap", "bandwidth", "environment"),
    compute=model_shares,
)

SECTION = Section(
    name="when_to_overlap",
    title="4. When to overlap",
    notebook="04_when_to_overlap.ipynb",
    parameters=WhenParameters,
    profiles={
        "smoke": {
            "cpu": [{"decode_batches": [1, 16], "prefill_tokens": [1024]}],
            "cuda": [{"decode_batches": [1, 16], "prefill_tokens": [1024]}],
        },
        "standard": {"cpu": [{}], "cuda": [{}]},
        "full": {"cpu": [{}], "cuda": [{}]},
    },
    share={"cpu": 0.01, "cuda": 0.005},
    derived=(WHEN_TO_OVERLAP, MODEL_SHARES),
    needs=("environment", "overlap", "bandwidth"),
)
