"""Section 5: a row-parallel layer's matmul and all-reduce as one operation, by every technique and beside its peers."""

import itertools
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field

from study.harness.forecast import TUNE_ARMS, TUNE_RUNS, is_cpu, sampled_s
from study.harness.machine import Machine
from study.harness.memory import BYTES_PER_ELEMENT, require, resolve_ranks, too_few_ranks
from study.harness.rates import Rates
from study.harness.spec import Dataset, Parameters, Point, Section, smaller
from study.sections.linear_all_reduce.methods import (
    CHAIN,
    CHAIN_METHODS,
    ENDURANCE_METHODS,
    FEW_ROWS,
    FEW_ROWS_METHODS,
    HAND_OVER_LAUNCHES,
    LAYERS,
    MANY_ROWS_METHODS,
    MATMUL,
    METHODS,
    TIMELINE_METHODS,
)
from study.sections.linear_all_reduce.schemas import (
    ENDURANCE_SCHEMA,
    HAND_OVER_SCHEMA,
    HOST_COST_SCHEMA,
    SCHEMA,
    STRICT_COST_SCHEMA,
    TIMELINE_SCHEMA,
)


class LinearParameters(Parameters):
    num_launches: int = Field(1, ge=1, description="separate process launches of every point, to see run-to-run spread")
    layers: list[str] = Field(list(LAYERS), description="which of the models' row-parallel layers")
    rows: list[int] = Field([1], description="rows M of the input: tokens in a batch or a prompt")
    shrink: int = Field(1, ge=1, description="divide the layers' N and K by this")
    dtype: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="type of all tensors")
    budget_s: float = Field(0.3, gt=0, description="seconds of samples per point, all methods together")
    min_iterations: int = Field(10, ge=2, description="samples of each method, at least")
    methods: list[str] = Field([], description=f"matmul + all-reduce above {FEW_ROWS} rows")
    few_rows_methods: list[str] = Field(
        [], description=f"matmul + all-reduce up to {FEW_ROWS} rows, each as far as it goes"
    )
    chain_methods: list[str] = Field([], description=f"with residual and RMSNorm, up to {FEW_ROWS} rows")
    timeline_layers: list[str] = Field([], description="profiled layers")
    timeline_rows: int = Field(4096, ge=1, description="rows M of the profiled layers")
    timeline_methods: list[str] = Field([], description="profiled methods")
    endurance_methods: list[str] = Field([], description="methods of this library that are run over and over")
    endurance_layers: list[str] = Field([], description="layers of the runs over and over; []: the first of the layers")
    endurance_rows: int = Field(1024, ge=1, description="largest M of the runs over and over")
    num_repeats: int = Field(1000, ge=1, description="runs that have to give the same bits")
    num_calls: int = Field(10_000, ge=10, description="calls of changing shapes in one process")
    host_cost_layer: str = Field("Qwen3-32B down_proj", description="layer whose calls' cost to the host is measured")
    host_cost_rows: list[int] = Field([], description="rows M of those calls; []: none")
    host_cost_rounds: int = Field(40, ge=10, description="samples of each of those calls")
    hand_over_layer: str = Field("Qwen3-32B o_proj", description="layer whose tiles are handed over again and again")
    hand_over_shrink_k: int = Field(8, ge=1, description="divide its K by this: less to multiply for each tile")
    hand_over_rows: list[int] = Field([], description="its rows M; []: none")
    hand_over_strict: list[bool] = Field([False], description="by the default fence (False), by the strict one (True)")
    hand_over_tiles: int = Field(10**8, ge=1, description="tiles that are handed over, at least, eager and replayed")
    hand_over_seconds: float = Field(60.0, gt=0, description="or as many as are in this time, of each")
    strict_cost_rows: list[int] = Field([], description="rows M at which the strict fence is timed; []: none")


def shape(parameters: LinearParameters, machine: Machine, layer: str, rows: int) -> Point:
    """What a point says of its layer; raises ValueError on an unknown one, or sizes that cannot be."""
    if layer not in LAYERS:
        raise ValueError(f"unknown layer {layer!r}; the layers are {', '.join(LAYERS)}")
    n, k = (width // parameters.shrink for width in LAYERS[layer])
    ranks = resolve_ranks(parameters.num_ranks, machine)
    if min(n, k) < 8 or k % ranks:
        raise ValueError(f"shrink = {parameters.shrink} leaves {layer} N = {n} and K = {k} on {ranks} ranks")
    if rows < 1:
        raise ValueError(f"rows = {rows} is below 1")
    # Results and buffers of all methods, references in wider types, the weights and one of them in float64.
    itemsize = BYTES_PER_ELEMENT[parameters.dtype]
    needed = rows * n * (16 * itemsize + 24) + k // ranks * (rows * itemsize + n * (itemsize + 8)) + 2**28
    require(f"{layer} with {rows} rows", needed, machine, ranks)
    return {"layer": layer, "m": rows, "n": n, "k": k, "dtype": parameters.dtype}


def named(asked: list[str], operation: str) -> str:
    """The methods of a point as it names them; raises ValueError with the valid ones."""
    for name in asked:
        if name not in METHODS[operation]:
            raise ValueError(f"unknown method {name!r} of {operation}; its methods are {', '.join(METHODS[operation])}")
    if len(set(asked)) < len(asked):
        raise ValueError(f"methods = {asked}: each is named once")
    return ",".join(asked)


def points(parameters: LinearParameters, machine: Machine) -> list[Point]:
    """Every layer at every number of rows."""
    asked = []
    many = named(parameters.methods or MANY_ROWS_METHODS[machine.kind], MATMUL)
    few = named(parameters.few_rows_methods or FEW_ROWS_METHODS[machine.kind], MATMUL).split(",")
    chain = named(parameters.chain_methods or CHAIN_METHODS[machine.kind], CHAIN)
    how = {"budget_s": parameters.budget_s, "min_iterations": parameters.min_iterations}
    for layer in parameters.layers:
        for rows in parameters.rows:
            at = shape(parameters, machine, layer, rows)
            fitting = [name for name in few if METHODS[MATMUL][name].is_for(rows)]
            methods = {"methods": many}
            if rows <= FEW_ROWS:
                methods = {"methods": ",".join(fitting), "chain_methods": chain}
            asked.append({**at, **{"chain_methods": ""}, **methods, **how})
    return asked


def timeline_points(parameters: LinearParameters, machine: Machine) -> list[Point]:
    methods = named(parameters.timeline_methods or TIMELINE_METHODS[machine.kind], MATMUL)
    return [
        {**shape(parameters, machine, layer, parameters.timeline_rows), "methods": methods}
        for layer in parameters.timeline_layers
    ]


def endurance_points(parameters: LinearParameters, machine: Machine) -> list[Point]:
    """Each method by itself on each layer, with as many rows as it is for."""
    asked = []
    counts = {"num_repeats": parameters.num_repeats, "num_calls": parameters.num_calls}
    layers = parameters.endurance_layers or parameters.layers[:1]
    for layer, name in itertools.product(layers, parameters.endurance_methods):
        operation = MATMUL if name in METHODS[MATMUL] else CHAIN
        named([name], operation)
        method = METHODS[operation][name]
        if method.how == "in_place":
            raise ValueError(f"endurance_methods: {name} sums in memory of one shape")
        most = FEW_ROWS if operation == CHAIN else method.max_rows or parameters.endurance_rows
        rows = min(parameters.endurance_rows, most)
        asked.append({**shape(parameters, machine, layer, rows), "method": name, **counts})
    return asked


def host_cost_points(parameters: LinearParameters, machine: Machine) -> list[Point]:
    layer, rounds = parameters.host_cost_layer, parameters.host_cost_rounds
    return [{**shape(parameters, machine, layer, rows), "num_rounds": rounds} for rows in parameters.host_cost_rows]


def hand_over_points(parameters: LinearParameters, machine: Machine) -> list[Point]:
    """The persistent kernel on one layer of less K, issued and replayed; none on a CPU, which has no such kernel."""
    if machine.kind != "cuda":
        return []
    layer, shrink_k = parameters.hand_over_layer, parameters.hand_over_shrink_k
    bounds = {"num_tiles": parameters.hand_over_tiles, "max_seconds": parameters.hand_over_seconds}
    asked = []
    for rows, strict in itertools.product(parameters.hand_over_rows, parameters.hand_over_strict):
        at = shape(parameters, machine, layer, rows)
        at["k"] //= shrink_k
        if at["k"] < 8 or at["k"] % resolve_ranks(parameters.num_ranks, machine):
            raise ValueError(f"hand_over_shrink_k = {shrink_k} leaves {layer} K = {at['k']}")
        asked += [{**at, "launch": launch, "strict": strict, **bounds} for launch in HAND_OVER_LAUNCHES]
    return asked


def strict_cost_points(parameters: LinearParameters, machine: Machine) -> list[Point]:
    """Every layer at those rows; none on a CPU, which has no such kernel."""
    if machine.kind != "cuda":
        return []
    how = {"budget_s": parameters.budget_s, "min_iterations": parameters.min_iterations}
    return [
        {**shape(parameters, machine, layer, rows), **how}
        for layer, rows in itertools.product(parameters.layers, parameters.strict_cost_rows)
    ]


def once_s(point: Point, rates: Rates) -> float:
    """The matmul and the all-reduce, once."""
    m, n = point["m"], point["n"]
    share = point["k"] // rates.num_ranks
    return rates.matmul_s(m, n, share, point["dtype"]) + rates.all_reduce_s(m * n * BYTES_PER_ELEMENT[point["dtype"]])


def seconds(point: Point, rates: Rates) -> float:
    """Of one point; on a GPU by the stored launches, where 2 s go to checks, tuning and captures whatever the size."""
    methods = [name for key in ("methods", "chain_methods") for name in point[key].split(",") if name]
    once = once_s(point, rates)
    sampled = sampled_s((len(methods) + 3) * once, point["budget_s"], point["min_iterations"])
    return sampled + 0.3 + TUNE_ARMS * TUNE_RUNS * once if is_cpu(rates) else sampled + 2.0


def timeline_seconds(point: Point, rates: Rates) -> float:
    return (1.5 if is_cpu(rates) else 5.0) + 5 * len(point["methods"].split(",")) * once_s(point, rates)


def endurance_seconds(point: Point, rates: Rates) -> float:
    """Of a method's repeats and calls, the latter of half as many rows in the mean; a call costs the host some time."""
    call_s = 2e-3 if is_cpu(rates) else 3e-4
    return (point["num_repeats"] + 0.5 * point["num_calls"]) * (once_s(point, rates) + call_s)


def host_cost_seconds(point: Point, rates: Rates) -> float:
    """Ten arms a round; on a GPU some ms of calls each, and the host's waits for the other ranks."""
    return 5.0 + 10 * (point["num_rounds"] + 1) * (2 * once_s(point, rates) + (3e-3 if is_cpu(rates) else 3e-2))


def hand_over_seconds(point: Point, rates: Rates) -> float:
    """By what fast links carry, about a quarter of it left to the tiles; and compiling and judging before."""
    return 4.0 + min(point["max_seconds"], point["num_tiles"] / 4e6)


def strict_cost_seconds(point: Point, rates: Rates) -> float:
    return 2.0 + sampled_s(2 * once_s(point, rates), point["budget_s"], point["min_iterations"])


def judge_launches(rows: pd.DataFrame) -> pd.DataFrame:
    """The ratios of the reported medians, so that each divides the times beside it."""
    speedup = rows["t_base_us"] / rows["time_us"]
    ideal = rows[["t_matmul_us", "t_comm_us"]].max(axis=1, skipna=False)
    return rows.assign(
        ideal_us=ideal,
        ect_us=rows["time_us"] - rows["t_matmul_us"],
        fraction_of_ideal=ideal / rows["time_us"],
        speedup=speedup,
        speedup_lo=np.minimum(rows["speedup_lo"], speedup),
        speedup_hi=np.maximum(rows["speedup_hi"], speedup),
    )


def num_ranks(parameters: LinearParameters, machine: Machine) -> int:
    return resolve_ranks(parameters.num_ranks, machine)


LINEAR = Dataset(
    name="linear_all_reduce",
    program="study.sections.linear_all_reduce.measure",
    method_version=3,  # from 3 on what timed replays leave is judged; before, only a run issued by itself was
    schema=SCHEMA,
    index=("layer", "m", "n", "k", "tp", "operation", "method"),
    points=points,
    num_ranks=num_ranks,
    unavailable=too_few_ranks,
    finish=judge_launches,
    seconds=seconds,
)
TIMELINE = Dataset(
    name="linear_timeline",
    program="study.sections.linear_all_reduce.measure_timeline",
    method_version=1,
    schema=TIMELINE_SCHEMA,
    index=("layer", "m", "method", "rank", "event"),
    repeated=False,
    points=timeline_points,
    num_ranks=num_ranks,
    unavailable=too_few_ranks,
    seconds=timeline_seconds,
)
ENDURANCE = Dataset(
    name="linear_endurance",
    program="study.sections.linear_all_reduce.measure_endurance",
    method_version=2,
    schema=ENDURANCE_SCHEMA,
    index=("layer", "operation", "method"),
    repeated=False,
    points=endurance_points,
    num_ranks=num_ranks,
    unavailable=too_few_ranks,
    seconds=endurance_seconds,
)
HOST_COST = Dataset(
    name="host_cost",
    program="study.sections.linear_all_reduce.measure_host_cost",
    method_version=1,
    schema=HOST_COST_SCHEMA,
    index=("layer", "m", "operation", "prepared"),
    repeated=False,
    points=host_cost_points,
    num_ranks=num_ranks,
    unavailable=too_few_ranks,
    seconds=host_cost_seconds,
)
HAND_OVER = Dataset(
    name="hand_over",
    program="study.sections.linear_all_reduce.measure_hand_over",
    method_version=1,
    schema=HAND_OVER_SCHEMA,
    index=("layer", "m", "k", "launch", "strict"),
    repeated=False,
    points=hand_over_points,
    num_ranks=num_ranks,
    unavailable=too_few_ranks,
    seconds=hand_over_seconds,
)
STRICT_COST = Dataset(
    name="strict_cost",
    program="study.sections.linear_all_reduce.measure_strict_cost",
    method_version=1,
    schema=STRICT_COST_SCHEMA,
    index=("layer", "m"),
    repeated=False,
    points=strict_cost_points,
    num_ranks=num_ranks,
    unavailable=too_few_ranks,
    seconds=strict_cost_seconds,
)
EVERY = {
    kind: {
        "methods": MANY_ROWS_METHODS[kind],
        "few_rows_methods": FEW_ROWS_METHODS[kind],
        "chain_methods": CHAIN_METHODS[kind],
        "timeline_methods": TIMELINE_METHODS[kind],
        "endurance_methods": ENDURANCE_METHODS[kind],
    }
    for kind in MANY_ROWS_METHODS
}
ONE_OF_EACH_N = ["Qwen3-8B o_proj", "Qwen3-32B down_proj", "Llama-70B-like o_proj"]
SECTION = Section(
    name="linear_all_reduce",
    title="5. Matmul + all-reduce as one operation",
    notebook="05_linear_all_reduce.ipynb",
    parameters=LinearParameters,
    profiles={
        "smoke": {
            "cpu": [{
                **EVERY["cpu"], "layers": ["Qwen3-8B o_proj"], "rows": [1, 512], "shrink": 16, "budget_s": 0.05,
                "min_iterations": 5, "timeline_layers": ["Qwen3-8B o_proj"], "timeline_rows": 512,
                "endurance_rows": 300, "num_repeats": 20, "num_calls": 100, "host_cost_rows": [1],
                "host_cost_rounds": 10,
            }],
            "cuda": smaller(
                {
                    **EVERY["cuda"], "layers": ["Qwen3-8B o_proj"], "rows": [16, 4096], "budget_s": 0.1,
                    "timeline_layers": ["Qwen3-8B o_proj"], "num_repeats": 100, "num_calls": 1000,
                    "host_cost_rows": [16], "host_cost_rounds": 10, "hand_over_rows": [2048], "hand_over_tiles": 10**6,
                    "strict_cost_rows": [4096],
                },
                {
                    "rows": [16, 2048], "budget_s": 0.05, "num_repeats": 20, "num_calls": 100, "hand_over_rows": [],
                    "strict_cost_rows": [],
                },
            ),
        },
        "standard": {
            "cpu": smaller(
                {
                    **EVERY["cpu"], "layers": ONE_OF_EACH_N, "rows": [1, 64, 256, 512, 1024], "shrink": 8,
                    "budget_s": 0.6, "min_iterations": 5, "timeline_layers": ["Qwen3-32B down_proj"],
                    "timeline_rows": 1024, "endurance_rows": 300, "num_calls": 1000, "host_cost_rows": [1, 128],
                },
                {"endurance_rows": 64, "num_repeats": 200, "budget_s": 0.3},
                {"shrink": 16, "num_calls": 400},
                {"rows": [1, 64, 256, 512], "timeline_rows": 512, "num_repeats": 50, "num_calls": 100},
            ),
            "cuda": smaller(
                {
                    **EVERY["cuda"], "layers": ONE_OF_EACH_N, "rows": [1, 16, 128, 256, 1024, 2048, 4096, 8192],
                    "timeline_layers": ["Qwen3-32B down_proj"], "host_cost_rows": [1, 128], "host_cost_rounds": 10,
                    "hand_over_rows": [2048], "hand_over_tiles": 10**6, "strict_cost_rows": [2048, 8192],
                },
                {"rows": [1, 16, 128, 256, 2048, 8192]},
                {"shrink": 4, "rows": [1, 16, 256, 2048], "num_repeats": 100, "num_calls": 1000},
            ),
        },
        "full": {
            "cpu": [{
                **EVERY["cpu"], "rows": [1, 16, 64, 256, 512, 1024, 2048], "shrink": 4, "budget_s": 2.0,
                "num_launches": 3, "timeline_layers": ["Qwen3-32B down_proj"], "timeline_rows": 1024,
                "host_cost_rows": [1, 128],
            }],
            "cuda": [{
                **EVERY["cuda"], "rows": [1, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384],
                "num_launches": 3, "timeline_layers": ["Qwen3-8B o_proj", "Qwen3-32B down_proj"],
                "endurance_layers": ["Qwen3-8B o_proj", "Qwen3-32B down_proj"],
                "host_cost_rows": [1, 16, 128, 512, 1024], "hand_over_rows": [2048],
                "strict_cost_rows": [512, 1024, 2048, 4096, 8192, 16384],
            }],
        },
    },
    share={"cpu": 0.1, "cuda": 0.163},
    datasets=(LINEAR, TIMELINE, ENDURANCE, HOST_COST, HAND_OVER, STRICT_COST),
)  # fmt: skip
