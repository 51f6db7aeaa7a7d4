"""Section 3: the bandwidth of every collective over every backend, by size, and latency and bandwidth fitted to it."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
import pandera.pandas as pa
from pydantic import Field
from scipy.optimize import nnls

from study.harness.forecast import is_cpu, sampled_s
from study.harness.machine import Machine
from study.harness.memory import BYTES_PER_ELEMENT, require, resolve_ranks, too_few_ranks
from study.harness.rates import Rates
from study.harness.spec import Dataset, Derived, Parameters, Point, Section, smaller

KIB, MIB, GIB = 2**10, 2**20, 2**30
PUBLISHED_BYTES = (8 * MIB, 32 * MIB, 64 * MIB)
Collective = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]
MIN_FIT_POINTS = 3


class BandwidthParameters(Parameters):
    num_launches: int = Field(1, ge=1, description="separate process launches of every point")
    collectives: list[Collective] = Field(
        ["all_reduce", "reduce_scatter", "all_gather", "all_to_all"], description="which collectives"
    )
    all_reduces: list[str] = Field([], description="backends of the all-reduce; []: those that work here")
    min_bytes: int = Field(8 * KIB, ge=1, description="smallest size; the sizes are its doublings")
    max_bytes: int = Field(16 * MIB, ge=1, description="largest size; the published 8, 32, 64 MiB all-reduces run too")
    dtype: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="type of the tensors; published: bf16")
    budget_s: float = Field(0.2, gt=0, description="seconds of samples per size, all backends together")
    min_iterations: int = Field(7, ge=2, description="samples of each backend, at least")


def points(parameters: BandwidthParameters, machine: Machine) -> list[Point]:
    """Every collective at every size, larger last; raises ValueError on sizes that do not divide or fit."""
    if parameters.min_bytes > parameters.max_bytes:
        raise ValueError(f"min_bytes = {parameters.min_bytes} is above max_bytes = {parameters.max_bytes}")
    doublings = int(math.log2(parameters.max_bytes / parameters.min_bytes))
    swept = {parameters.min_bytes << doubling for doubling in range(doublings + 1)}
    num_ranks = resolve_ranks(parameters.num_ranks, machine)
    itemsize = BYTES_PER_ELEMENT[parameters.dtype]
    asked = []
    for collective in parameters.collectives:
        for size in sorted(swept | set(PUBLISHED_BYTES if collective == "all_reduce" else ())):
            # Whole 16-byte words per rank; rounded down where the ranks are not a power of two.
            size -= size % (16 * num_ranks)
            if size == 0:
                raise ValueError(f"min_bytes = {parameters.min_bytes} is below 16 bytes for each of {num_ranks} ranks")
            # Buffers of the backends, many of which share one, and the reference in wider types.
            require(f"{collective} of {size} bytes", size * (12 + 20 / itemsize), machine, num_ranks)
            point = {
                "collective": collective, "bytes": size, "dtype": parameters.dtype,
                "budget_s": parameters.budget_s, "min_iterations": parameters.min_iterations,
            }  # fmt: skip
            if collective == "all_reduce" and parameters.all_reduces:
                point["backends"] = ",".join(parameters.all_reduces)
            asked.append(point)
    return asked


def seconds(point: Point, rates: Rates) -> float:
    """Of one point: its backends on a GPU are a dozen, by the stored launches 0.4 s in all besides the samples."""
    once = rates.all_reduce_s(point["bytes"])
    if is_cpu(rates):
        return 0.1 + sampled_s(once, point["budget_s"], point["min_iterations"], num_before=4)
    return 0.4 + sampled_s(12 * once, point["budget_s"], point["min_iterations"])


TIME = pa.Column(float, pa.Check.gt(0), nullable=True)
BANDWIDTH_SCHEMA = pa.DataFrameSchema(
    {
        "point_key": pa.Column(str),
        "collective": pa.Column(str),
        "backend": pa.Column(str),
        "bytes": pa.Column(int, pa.Check.gt(0)),
        "dtype": pa.Column(str, pa.Check.isin(list(BYTES_PER_ELEMENT))),
        "num_ranks": pa.Column(int, pa.Check.ge(2)),
        "timing": pa.Column(str, pa.Check.isin(["graph", "backlog", "host", ""])),
        "time_us": TIME,
        "time_lo_us": TIME,
        "time_hi_us": TIME,
        "algbw_gb_per_s": TIME,
        "busbw_gb_per_s": TIME,
        "effective_bandwidth_gb_per_s": TIME,
        "num_launches": pa.Column(int, pa.Check.ge(1)),
        "correct": pa.Column(bool),
        "error": pa.Column(str),
    },
    strict=False,
    coerce=True,
)
FIT_SCHEMA = pa.DataFrameSchema(
    {
        "collective": pa.Column(str),
        "backend": pa.Column(str),
        "latency_us": pa.Column(float, pa.Check.ge(0)),
        "bandwidth_gb_per_s": pa.Column(float, pa.Check.gt(0), nullable=True),
        "rms_relative_error": pa.Column(float, pa.Check.ge(0)),
        "num_points": pa.Column(int, pa.Check.ge(MIN_FIT_POINTS)),
        "min_bytes": pa.Column(int),
        "max_bytes": pa.Column(int),
    },
    strict=False,
    coerce=True,
)


def fit(bus_bytes: np.ndarray, time_us: np.ndarray) -> tuple[float, float, float]:
    """(latency µs, bandwidth GB/s, rms relative error) of t = latency + bytes · factor / B, both at least 0.

    Least squares of the relative errors, so small sizes count as much as large ones. `bus_bytes` is bytes · factor.
    The bandwidth is NaN when the times do not grow with size.
    """
    design = np.stack([1 / time_us, bus_bytes / time_us], axis=1)
    # Columns of like size, else the non-negative solver stops early.
    scale = np.linalg.norm(design, axis=0)
    solution, _ = nnls(design / scale, np.ones(len(time_us)))
    latency, slope = solution / scale
    rms = float(np.sqrt(np.mean((design @ [latency, slope] - 1) ** 2)))
    return float(latency), (1e-3 / slope if slope > 0 else math.nan), rms


def bandwidth_fit(tables: Mapping[str, pd.DataFrame], parameters: Any) -> pd.DataFrame:
    """One row per collective and backend with at least 3 measured sizes."""
    table = tables["bandwidth"]
    rows = []
    for (collective, backend), group in table[table["time_us"].gt(0)].groupby(["collective", "backend"], sort=True):
        if len(group) < MIN_FIT_POINTS:
            continue
        bus_bytes = group["busbw_gb_per_s"] * group["time_us"] * 1e3
        latency, bandwidth, rms = fit(bus_bytes.to_numpy(float), group["time_us"].to_numpy(float))
        rows.append({
            "collective": collective, "backend": backend, "latency_us": latency, "bandwidth_gb_per_s": bandwidth,
            "rms_relative_error": rms, "num_points": len(group),
            "min_bytes": group["bytes"].min(), "max_bytes": group["bytes"].max(),
        })  # fmt: skip
    return pd.DataFrame(rows, columns=list(FIT_SCHEMA.columns))


BANDWIDTH = Dataset(
    name="bandwidth",
    program="study.sections.bandwidth.measure",
    method_version=2,
    schema=BANDWIDTH_SCHEMA,
    index=("collective", "backend", "bytes"),
    points=points,
    num_ranks=lambda parameters, machine: resolve_ranks(parameters.num_ranks, machine),
    unavailable=too_few_ranks,
    seconds=seconds,
)
FIT = Derived(
    name="bandwidth_fit",
    method_version=1,
    schema=FIT_SCHEMA,
    index=("collective", "backend"),
    inputs=("bandwidth",),
    compute=bandwidth_fit,
)
SECTION = Section(
    name="bandwidth",
    title="3. Communication bandwidth",
    notebook="03_bandwidth.ipynb",
    parameters=BandwidthParameters,
    profiles={
        "smoke": {
            "cpu": [{"max_bytes": 128 * KIB, "budget_s": 0.02, "collectives": ["all_reduce", "all_gather"]}],
            "cuda": smaller(
                {"max_bytes": 8 * MIB, "budget_s": 0.05},
                {"max_bytes": 256 * KIB, "collectives": ["all_reduce", "all_gather"]},
            ),
        },
        "standard": {
            "cpu": smaller({"budget_s": 0.4}, {"budget_s": 0.1, "min_iterations": 5}, {"max_bytes": 2 * MIB}),
            "cuda": smaller({"max_bytes": 256 * MIB, "budget_s": 0.1}, {"max_bytes": 64 * MIB}),
        },
        "full": {
            "cpu": [{"max_bytes": 64 * MIB, "budget_s": 1.0, "num_launches": 3}],
            # Smaller where a GPU's memory does not hold every backend's buffers.
            "cuda": smaller({"max_bytes": GIB, "budget_s": 0.1, "num_launches": 3}, {"max_bytes": 256 * MIB}),
        },
    },
    share={"cpu": 0.045, "cuda": 0.057},
    datasets=(BANDWIDTH,),
    derived=(FIT,),
)
