"""The section of a small experiment program, for testing the machinery that real ones go through."""

import pandera.pandas as pa

from study.harness.rates import Rates
from study.harness.spec import Dataset, Parameters, Section


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
    program="tests.toy_program",
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
