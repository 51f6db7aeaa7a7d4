"""A small experiment program and its section, for testing the machinery that real ones go through."""

import os
import pathlib
import time

import pandera.pandas as pa
import torch
import torch.distributed as dist

from study.harness import worker
from study.harness.rates import Rates
from study.harness.spec import Dataset, Parameters, Section

STEP_S = worker.HEARTBEAT_S = 0.2


class ToyParameters(Parameters):
    sizes: list[int] = [1, 2, 3]
    seconds: float = 0.0
    fail_at: int = 0
    hang_at: int = 0


def points(parameters, machine):
    fails, hangs, seconds = parameters.fail_at, parameters.hang_at, parameters.seconds
    return [
        {"size": size, "seconds": seconds, "fails": size == fails, "hangs": size == hangs} for size in parameters.sizes
    ]


SCHEMA = pa.DataFrameSchema(
    {
        "point_key": pa.Column(str),
        "size": pa.Column(int, pa.Check.gt(0)),
        "time_us": pa.Column(float, pa.Check.gt(0)),
        "time_lo_us": pa.Column(float),
        "time_hi_us": pa.Column(float),
        "correct": pa.Column(bool),
        "num_launches": pa.Column(int, pa.Check.ge(1)),
        "error": pa.Column(str),
    },
    coerce=True,
)
DATASET = Dataset(
    name="toy",
    program="tests.toy",
    method_version=1,
    schema=SCHEMA,
    index=("size",),
    points=points,
    num_ranks=lambda parameters, machine: parameters.num_ranks or 2,
    seconds=lambda point, rates: point["seconds"],
)
# What a machine does, where it does not matter.
RATES = Rates(2, {"bf16": 4e10, "fp32": 1e11}, {1 << 16: 100.0, 1 << 22: 5000.0}, 1e10, start_s=12.0)
SECTION = Section(
    name="toy",
    title="Toy",
    notebook="toy.ipynb",
    parameters=ToyParameters,
    profiles={profile: {"cpu": [{}], "cuda": [{}]} for profile in ("smoke", "standard", "full")},
    share=0.1,
    datasets=(DATASET,),
)


def measure(point, context):
    with pathlib.Path(os.environ["TOY_LOG"]).open("a") as log:
        log.write(f"{point['size']}\n")
    for _ in range(round(point["seconds"] / STEP_S)):
        time.sleep(STEP_S)
        context.step()
    while point["hangs"]:
        time.sleep(STEP_S)
    if point["fails"]:
        raise RuntimeError(f"the toy breaks at size {point['size']}")
    total = torch.tensor([float(context.rank + 1)])
    dist.all_reduce(total)
    time_us = point["size"] * total.item()
    row = {"time_us": time_us, "time_lo_us": time_us - 1, "time_hi_us": time_us + 1, "correct": True}
    return worker.Result([row], [worker.Samples("time_us", [[time_us] * 4] * context.num_ranks)])


if __name__ == "__main__":
    worker.main(measure)
