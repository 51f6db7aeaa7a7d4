"""Section 1: independent work beside an all-reduce, as published, with better techniques, and over a grid of sizes."""

from typing import Literal

import numpy as np
import pandas as pd
import pandera.pandas as pa
from pydantic import Field

from study.harness import stats
from study.harness.forecast import TUNE_ARMS, TUNE_RUNS, is_cpu, sampled_s
from study.harness.machine import Machine
from study.harness.memory import resolve_ranks, too_few_ranks
from study.harness.rates import Rates
from study.harness.spec import Dataset, Parameters, Point, Section, smaller
from study.sections.overlap.eager import OVERLAP_EAGER
from study.sections.overlap.methods import (
    DEVICE_METHODS,
    FIRST_METHODS,
    FIRST_SWEEP_METHODS,
    METHODS,
    PUBLISHED,
    SWEEP,
    SWEEP_METHODS,
)
from study.sections.overlap.shared import COMMON, RATIO, TIME, check_methods, check_sizes, sizes
from study.sections.overlap.sm_sharing import SM_SHARING

KIB, MIB = 2**10, 2**20
SMALLEST = next(iter(PUBLISHED))
TIMELINE_METHODS = {
    "cpu": ["sequential", "two_stream"],
    "cuda": ["sequential", "two_stream", "maco_push_64_stream", "maco_staged_8_stream"],
}


class OverlapParameters(Parameters):
    num_launches: int = Field(1, ge=1, description="separate process launches of every point, to see run-to-run spread")
    configurations: list[str] = Field(list(PUBLISHED), description="which of the published configurations, as printed")
    protocols: list[Literal["device", "published"]] = Field(["device", "published"], description="how they are timed")
    shrink: int = Field(1, ge=1, description="divide the published matmul n by this and the bytes by its square")
    dtype: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="type of all tensors; published: bf16")
    budget_s: float = Field(1.0, gt=0, description="seconds of samples per configuration in the device protocol")
    min_iterations: int = Field(10, ge=2, description="samples of each arm, at least, in the device protocol")
    published_iterations: int = Field(50, ge=2, description="samples of each arm in the published protocol")
    published_launches: int | None = Field(
        None, ge=1, description="launches of the points of the published protocol; None: num_launches"
    )
    methods: list[str] = Field([], description="techniques in the device protocol; []: those of before the planner")
    sweep_methods: list[str] = Field([], description="techniques in the sweep; []: those of before the planner")
    sweep_comm_bytes: list[int] = Field([], description="bytes of the all-reduced tensor in the sweep")
    sweep_matmul_n: list[int] = Field([], description="n of the n×n matmul in the sweep")
    sweep_budget_s: float = Field(0.2, gt=0, description="seconds of samples per point of the sweep")
    sm_sharing_n: list[int] = Field([], description="n of the n×n matmuls that SMs are taken from")
    eager_configurations: list[str] = Field([], description="configurations also timed in eager code, without a graph")
    timeline_methods: list[str] = Field([], description="techniques profiled; []: those of before the planner")
    timeline_configurations: list[str] = Field(["Large compute, large comm"], description="profiled configurations")


def points(parameters: OverlapParameters, machine: Machine) -> list[Point]:
    """Published configurations in each protocol, then the sweep (device protocol)."""
    asked: list[Point] = []
    device_methods = check_methods(parameters.methods or FIRST_METHODS[machine.kind])
    sweep_methods = check_methods(parameters.sweep_methods or FIRST_SWEEP_METHODS[machine.kind])
    for name in parameters.configurations:
        comm_bytes, matmul_n = sizes(parameters, name)
        shared = {"configuration": name, "comm_bytes": comm_bytes, "matmul_n": matmul_n}
        for protocol in parameters.protocols:
            if protocol == "device":
                methods = device_methods
                how = {"budget_s": parameters.budget_s, "min_iterations": parameters.min_iterations}
            else:
                methods = ",".join(METHODS["published"])
                how = {"iterations": parameters.published_iterations}
            asked.append({**shared, "protocol": protocol, "methods": methods, **how})
    for comm_bytes in parameters.sweep_comm_bytes:
        for matmul_n in parameters.sweep_matmul_n:
            cell = {"configuration": SWEEP, "comm_bytes": comm_bytes, "matmul_n": matmul_n, "protocol": "device"}
            how = {"budget_s": parameters.sweep_budget_s, "min_iterations": parameters.min_iterations}
            asked.append({**cell, "methods": sweep_methods, **how})
    for point in asked:
        check_sizes(parameters, machine, point["comm_bytes"], point["matmul_n"])
    return [{**point, "dtype": parameters.dtype} for point in asked]


def timeline_points(parameters: OverlapParameters, machine: Machine) -> list[Point]:
    asked = []
    if "auto" in parameters.timeline_methods:
        raise ValueError("timeline_methods names 'auto', which tries several plans: name the technique that it chose")
    methods = check_methods(parameters.timeline_methods or ["sequential", "two_stream"])
    for name in parameters.timeline_configurations:
        comm_bytes, matmul_n = sizes(parameters, name)
        check_sizes(parameters, machine, comm_bytes, matmul_n)
        cell = {"configuration": name, "comm_bytes": comm_bytes, "matmul_n": matmul_n}
        asked.append({**cell, "methods": methods, "dtype": parameters.dtype})
    return asked


def sides_s(point: Point, rates: Rates) -> float:
    """One after the other, once."""
    n = point["matmul_n"]
    return rates.matmul_s(n, n, n, point["dtype"]) + rates.all_reduce_s(point["comm_bytes"])


def made_s(point: Point, rates: Rates) -> float:
    """Operands and references: random numbers, and some rows in float64, which has half the rate of fp32."""
    n, fp64_flops = point["matmul_n"], rates.flops["fp32"] / 2
    if not is_cpu(rates):
        return 0.3
    return 0.2 + (4 * n * n + 4 * point["comm_bytes"]) * 1e-8 + 2 * min(n, 128) * n * n / fp64_flops


def seconds(point: Point, rates: Rates) -> float:
    """Of one point; on a GPU by the stored launches, where 1.5 s go to checks and captures whatever the size."""
    once, methods = sides_s(point, rates), point["methods"].split(",")
    if "iterations" in point:
        return made_s(point, rates) + (1.5 * point["iterations"] + 2) * (len(methods) + 1) * once
    if not is_cpu(rates):
        return 1.5 + sampled_s((len(methods) + 6) * once, point["budget_s"], point["min_iterations"])
    sampled = sampled_s((len(methods) + 1) * once, point["budget_s"], point["min_iterations"])
    stretched = 4 * (len(methods) - 1) * once
    return made_s(point, rates) + sampled + stretched + ("auto" in methods) * TUNE_ARMS * TUNE_RUNS * once


def timeline_seconds(point: Point, rates: Rates) -> float:
    return made_s(point, rates) + len(point["methods"].split(",")) * (1.0 + 5 * sides_s(point, rates))


def start_s(point: Point, rates: Rates) -> float:
    """On GPUs the planner's first use compiles every all-reduce."""
    return rates.start_s + (15.0 if "auto" in point["methods"] and not is_cpu(rates) else 0.0)


TIMES = ("t_comm", "t_comp", "t_seq", "t_overlap")
OVERLAP_SCHEMA = pa.DataFrameSchema(
    {
        **COMMON,
        "protocol": pa.Column(str, pa.Check.isin(list(METHODS))),
        "method": pa.Column(str),
        "backend": pa.Column(str),
        "plan": pa.Column(str, required=False),  # tables from before the planner have none
        "published_size": pa.Column(bool),
        "timing": pa.Column(str, pa.Check.isin(["graph", "backlog", "host", ""])),
        **{f"{name}{bound}_us": TIME for name in TIMES for bound in ("", "_lo", "_hi")},
        # Mean SM clocks: none on CPUs, in the published protocol and in tables of earlier runs.
        "clock_mhz": pa.Column(float, pa.Check.gt(0), nullable=True, required=False),
        "compute_clock_mhz": pa.Column(float, pa.Check.gt(0), nullable=True, required=False),
        "t_comm_best_us": TIME,
        "t_seq_backend_us": TIME,
        "ideal_us": TIME,
        "speedup": TIME,
        "speedup_lo": RATIO,
        "speedup_hi": RATIO,
        "speedup_collective": TIME,
        "speedup_overlap": TIME,
        "fraction_of_ideal": TIME,
        "eta": RATIO,
        "sigma_comm": TIME,
        "sigma_comp": TIME,
        "verdict": pa.Column(str, pa.Check.isin(["helps", "hurts", "undecided", ""])),
        "correct": pa.Column(bool),
    },
    strict=False,
    coerce=True,
)
TIMELINE_SCHEMA = pa.DataFrameSchema(
    {
        **COMMON,
        "method": pa.Column(str),
        "rank": pa.Column(int, pa.Check.ge(0)),
        "event": pa.Column(int, pa.Check.ge(0)),
        "lane": pa.Column(str),
        "name": pa.Column(str),
        "category": pa.Column(str, pa.Check.isin(["comm", "compute"])),
        # Timelines from before graph replays say nothing of it: theirs were launched by the host.
        "timing": pa.Column(str, pa.Check.isin(["graph", "eager", "host", ""]), required=False),
        "start_us": pa.Column(float, pa.Check.ge(0)),
        "duration_us": pa.Column(float, pa.Check.ge(0)),
        "correct": pa.Column(bool),
    },
    strict=False,
    coerce=True,
)


def num_ranks(parameters: OverlapParameters, machine: Machine) -> int:
    return resolve_ranks(parameters.num_ranks, machine)


def launches(parameters: OverlapParameters, point: Point) -> int:
    """The host's clock differs more from launch to launch than the device's: those points may get more of them."""
    published = point["protocol"] == "published" and parameters.published_launches
    return published or parameters.num_launches


def judge_launches(rows: pd.DataFrame) -> pd.DataFrame:
    """The ratios of the reported medians, so that each divides the times beside it, and the verdict of the interval
    that covers every launch."""
    speedup = rows["t_seq_us"] / rows["t_overlap_us"]
    # The ratio of medians over launches need not lie in the interval of the launches' ratios.
    low, high = np.minimum(rows["speedup_lo"], speedup), np.maximum(rows["speedup_hi"], speedup)
    ideal = rows[["t_comp_us", "t_comm_best_us"]].max(axis=1, skipna=False)
    saved = rows["t_comm_us"] + rows["t_comp_us"] - rows["t_overlap_us"]
    return rows.assign(
        ideal_us=ideal,
        speedup=speedup,
        speedup_lo=low,
        speedup_hi=high,
        speedup_collective=rows["t_seq_us"] / rows["t_seq_backend_us"],
        speedup_overlap=rows["t_seq_backend_us"] / rows["t_overlap_us"],
        fraction_of_ideal=ideal / rows["t_overlap_us"],
        eta=saved / rows[["t_comm_us", "t_comp_us"]].min(axis=1, skipna=False),
        verdict=[stats.verdict(lo, hi) if lo == lo else "" for lo, hi in zip(low, high, strict=True)],
    )


OVERLAP = Dataset(
    name="overlap",
    program="study.sections.overlap.measure",
    method_version=2,
    schema=OVERLAP_SCHEMA,
    index=("configuration", "comm_bytes", "matmul_n", "protocol", "method"),
    points=points,
    num_ranks=num_ranks,
    unavailable=too_few_ranks,
    launches=launches,
    finish=judge_launches,
    seconds=seconds,
    start_s=start_s,
)
TIMELINE = Dataset(
    name="overlap_timeline",
    program="study.sections.overlap.measure_timeline",
    method_version=1,
    schema=TIMELINE_SCHEMA,
    index=("configuration", "method", "rank", "event"),
    repeated=False,
    points=timeline_points,
    num_ranks=num_ranks,
    unavailable=too_few_ranks,
    seconds=timeline_seconds,
)
EVERY = {
    kind: {
        "methods": DEVICE_METHODS[kind],
        "sweep_methods": SWEEP_METHODS[kind],
        "timeline_methods": TIMELINE_METHODS[kind],
    }
    for kind in DEVICE_METHODS
}
SECTION = Section(
    name="overlap",
    title="1. Overlap of an all-reduce with a matmul",
    notebook="01_overlap.ipynb",
    parameters=OverlapParameters,
    profiles={
        "smoke": {
            "cpu": [{
                **EVERY["cpu"],
                "shrink": 16, "budget_s": 0.05, "min_iterations": 5, "published_iterations": 5,
                "sweep_comm_bytes": [64 * KIB, MIB], "sweep_matmul_n": [64, 256], "sweep_budget_s": 0.03,
                "sm_sharing_n": [256], "eager_configurations": [SMALLEST],
            }],
            "cuda": smaller(
                {
                    **EVERY["cuda"],
                    "budget_s": 0.2, "published_iterations": 10, "sweep_budget_s": 0.05,
                    "sweep_comm_bytes": [MIB, 16 * MIB], "sweep_matmul_n": [1024, 4096],
                    "sm_sharing_n": [4096], "eager_configurations": ["Large compute, large comm"],
                },
                {"shrink": 4, "sweep_matmul_n": [512, 1024], "sm_sharing_n": [1024]},
                {
                    "budget_s": 0.05, "configurations": [SMALLEST, "Large compute, large comm"],
                    "sweep_comm_bytes": [MIB], "sweep_matmul_n": [512],
                },
            ),
        },
        "standard": {
            "cpu": smaller(
                {
                    **EVERY["cpu"],
                    "budget_s": 2.5, "min_iterations": 5, "published_iterations": 4, "sweep_budget_s": 0.4,
                    "sweep_comm_bytes": [64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB],
                    "sweep_matmul_n": [256, 512, 1024, 1536],
                    "sm_sharing_n": [1024], "eager_configurations": [SMALLEST],
                },
                {"shrink": 2, "sweep_matmul_n": [128, 256, 512, 1024]},
                {"budget_s": 1.0, "sweep_budget_s": 0.2, "sweep_matmul_n": [128, 256, 512]},
                {"shrink": 4, "sm_sharing_n": [512]},
                {"shrink": 8, "sweep_comm_bytes": [64 * KIB, 256 * KIB, MIB], "sweep_matmul_n": [64, 128, 256]},
            ),
            "cuda": smaller(
                {
                    **EVERY["cuda"],
                    "sweep_comm_bytes": [256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB],
                    "sweep_matmul_n": [1024, 2048, 4096, 8192], "timeline_configurations": list(PUBLISHED),
                    "sm_sharing_n": [2048, 4096, 8192], "eager_configurations": list(PUBLISHED),
                },
                {"sweep_comm_bytes": [256 * KIB, MIB, 4 * MIB, 16 * MIB], "sweep_matmul_n": [1024, 2048, 4096]},
                {
                    "shrink": 4, "sweep_matmul_n": [512, 1024, 2048], "sm_sharing_n": [1024, 2048],
                    "eager_configurations": [SMALLEST],
                },
            ),
        },
        "full": {
            "cpu": [{
                **EVERY["cpu"],
                "budget_s": 20.0, "num_launches": 3, "sweep_budget_s": 1.0,
                "sweep_comm_bytes": [64 * KIB, 256 * KIB, MIB, 4 * MIB, 8 * MIB, 16 * MIB],
                "sweep_matmul_n": [256, 512, 768, 1024, 1536, 2048], "timeline_configurations": list(PUBLISHED),
                "sm_sharing_n": [1024], "eager_configurations": [SMALLEST],
            }],
            "cuda": [{
                **EVERY["cuda"],
                "num_launches": 3, "sweep_budget_s": 0.1,
                "sweep_comm_bytes": [256 * KIB, MIB, 4 * MIB, 8 * MIB, 16 * MIB, 32 * MIB, 64 * MIB, 128 * MIB],
                "sweep_matmul_n": [1024, 2048, 3072, 4096, 6144, 8192], "timeline_configurations": list(PUBLISHED),
                "sm_sharing_n": [1024, 2048, 4096, 8192], "eager_configurations": list(PUBLISHED),
            }],
        },
    },
    share={"cpu": 0.2, "cuda": 0.23},
    datasets=(OVERLAP, TIMELINE, SM_SHARING, OVERLAP_EAGER),
)  # fmt: skip
