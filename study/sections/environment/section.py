"""Section 0: what this machine is and what its parts can do alone, against which everything else is judged."""

from typing import Literal

import pandera.pandas as pa
from pydantic import Field

from study.harness.forecast import sampled_s
from study.harness.machine import Machine
from study.harness.rates import Rates
from study.harness.spec import Dataset, Point, Section, SectionParameters, smaller

MIB = 2**20
MIN_ITERATIONS = 7


class EnvironmentParameters(SectionParameters):
    num_launches: int = Field(1, ge=1, description="separate process launches per point; rows are medians over them")
    matmul_n: list[int] = Field([256, 512, 1024, 2048], min_length=1, description="n of the n×n matmuls of every type")
    dtype: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="type of the other sections, and of skinny_m")
    skinny_m: list[int] = Field([1, 64], description="m of the (m, n) @ (n, n) matmuls; n is skinny_n")
    skinny_n: int = Field(2048, ge=1, description="n of those; its n×n weights should not fit into a cache")
    copy_mib: int = Field(64, ge=1, description="size of the copied tensors in MiB")
    budget_s: float = Field(0.3, gt=0, description="seconds to time each for; 7 repetitions, fewer of what is slow")


def points(parameters: EnvironmentParameters, machine: Machine) -> list[Point]:
    """One flat point per quantity and shape; `threads` is 0 on a GPU. A GPU's largest fp32 matmul is 4096."""
    cuda = machine.kind == "cuda"
    cores = machine.num_devices
    # Of a CPU both what one of two ranks can do and what the whole can do.
    thread_counts = [0] if cuda else sorted({max(1, cores // 2), cores})
    base = {"peer": "", "budget_s": parameters.budget_s}
    result = []
    for threads in thread_counts:
        device = {"device": "cuda:0" if cuda else "cpu", "threads": threads, **base}
        for dtype in dict.fromkeys(("bf16", "fp32", parameters.dtype)):
            for n in parameters.matmul_n:
                if dtype != "fp32" or n <= 4096:
                    result.append({"quantity": "matmul", **device, "dtype": dtype, "m": n, "n": n, "k": n, "bytes": 0})
        n = parameters.skinny_n
        for m in parameters.skinny_m:
            skinny = {"dtype": parameters.dtype, "m": m, "n": n, "k": n, "bytes": 0}
            result.append({"quantity": "matmul", **device, **skinny})
        copy = {**device, "dtype": "", "m": 0, "n": 0, "k": 0, "bytes": parameters.copy_mib * MIB}
        result.append({"quantity": "memory_copy", **copy})
        if cuda:
            result.append({"quantity": "host_to_device", **copy})
            result.append({"quantity": "device_to_host", **copy})
            for peer in range(1, machine.num_devices):
                result += [{"quantity": name, **copy, "peer": f"cuda:{peer}"} for name in ("peer_write", "peer_read")]
            if machine.description["link_limit_gb_per_s"] is not None:
                result.append({"quantity": "link_limit", **copy, "bytes": 0})
    return result


def seconds(point: Point, rates: Rates) -> float:
    """Of one point: the samples, its operands and its check."""
    if point["quantity"] == "link_limit":
        return 0.0
    if point["quantity"] == "matmul":
        once = rates.matmul_s(point["m"], point["n"], point["k"], point["dtype"])
    else:
        once = 2 * point["bytes"] / rates.copy_bytes_per_s
    return 0.1 + sampled_s(once, point["budget_s"], MIN_ITERATIONS)


SCHEMA = pa.DataFrameSchema(
    {
        "point_key": pa.Column(str),
        "quantity": pa.Column(
            str,
            pa.Check.isin(
                ["matmul", "memory_copy", "host_to_device", "device_to_host", "peer_write", "peer_read", "link_limit"]
            ),
        ),
        "device": pa.Column(str),
        "peer": pa.Column(str),
        "dtype": pa.Column(str, pa.Check.isin(["bf16", "fp16", "fp32", ""])),
        "m": pa.Column(int, pa.Check.ge(0)),
        "n": pa.Column(int, pa.Check.ge(0)),
        "k": pa.Column(int, pa.Check.ge(0)),
        "bytes": pa.Column(int, pa.Check.ge(0)),
        "threads": pa.Column(int, pa.Check.ge(0)),
        "value": pa.Column(float, pa.Check.gt(0), nullable=True),
        "value_lo": pa.Column(float, pa.Check.gt(0), nullable=True),
        "value_hi": pa.Column(float, pa.Check.gt(0), nullable=True),
        "unit": pa.Column(str, pa.Check.isin(["TFLOP/s", "GB/s"])),
        "time_us": pa.Column(float, pa.Check.gt(0), nullable=True),
        "iterations": pa.Column(float, pa.Check.ge(1), nullable=True),
        "timing": pa.Column(str, pa.Check.isin(["graph", "backlog", "host", ""])),
        "source": pa.Column(str, pa.Check.isin(["measured", "nvml"])),
        "correct": pa.Column(bool),
        "error": pa.Column(str),
        "num_launches": pa.Column(int, pa.Check.ge(1)),
    },
    strict=False,
    coerce=True,
)

ENVIRONMENT = Dataset(
    name="environment",
    program="study.sections.environment.measure",
    method_version=2,
    schema=SCHEMA,
    index=("quantity", "device", "peer", "dtype", "m", "n", "k", "bytes", "threads"),
    points=points,
    num_ranks=lambda parameters, machine: 1,
    seconds=seconds,
)

SECTION = Section(
    name="environment",
    title="0. This machine and its ceilings",
    notebook="00_environment.ipynb",
    parameters=EnvironmentParameters,
    profiles={
        "smoke": {
            "cpu": [{"matmul_n": [128, 256], "skinny_m": [1], "skinny_n": 512, "copy_mib": 8, "budget_s": 0.05}],
            "cuda": [{"matmul_n": [1024, 2048], "skinny_m": [1], "skinny_n": 4096, "copy_mib": 64, "budget_s": 0.05}],
        },
        "standard": {
            "cpu": smaller(
                {}, {"matmul_n": [256, 512, 1024]}, {"matmul_n": [128, 256, 512], "skinny_n": 1024, "budget_s": 0.1}
            ),
            "cuda": smaller(
                {
                    "matmul_n": [256, 512, 1024, 2048, 4096, 8192], "skinny_m": [1, 16, 64, 256], "skinny_n": 8192,
                    "copy_mib": 512, "budget_s": 0.5,
                },
                {"matmul_n": [256, 512, 1024, 2048], "skinny_n": 2048, "copy_mib": 64, "budget_s": 0.2},
            ),
        },
        "full": {
            "cpu": [{
                "matmul_n": [256, 512, 1024, 2048, 4096], "skinny_m": [1, 16, 64, 256], "skinny_n": 4096,
                "budget_s": 0.5,
            }],
            "cuda": [{
                "matmul_n": [256, 512, 1024, 2048, 4096, 8192], "skinny_m": [1, 16, 64, 256], "skinny_n": 8192,
                "copy_mib": 512, "budget_s": 0.5,
            }],
        },
    },
    share={"cpu": 0.035, "cuda": 0.02},
    datasets=(ENVIRONMENT,),
)  # fmt: skip
