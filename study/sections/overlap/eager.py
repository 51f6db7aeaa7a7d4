"""The table `overlap_eager` of section 1: what launching does to overlap, with either side on the current stream."""

import pandera.pandas as pa

from study.harness.forecast import TUNE_ARMS, TUNE_RUNS, is_cpu, sampled_s
from study.harness.machine import Machine
from study.harness.memory import resolve_ranks, too_few_ranks
from study.harness.rates import Rates
from study.harness.spec import Dataset, Parameters, Point
from study.sections.overlap.methods import EAGER_METHODS, LAUNCHED
from study.sections.overlap.shared import COMMON, RATIO, TIME, check_methods, check_sizes, sizes


def points(parameters: Parameters, machine: Machine) -> list[Point]:
    """The configurations asked for; the launch modes share half the time of one in the device protocol."""
    methods, modes = check_methods(EAGER_METHODS[machine.kind]), LAUNCHED[machine.kind]
    how = {"budget_s": parameters.budget_s / 2 / len(modes), "min_iterations": parameters.min_iterations}
    asked = []
    for name in parameters.eager_configurations:
        comm_bytes, matmul_n = sizes(parameters, name)
        check_sizes(parameters, machine, comm_bytes, matmul_n)
        cell = {"configuration": name, "comm_bytes": comm_bytes, "matmul_n": matmul_n, "dtype": parameters.dtype}
        asked.append({**cell, "launched": ",".join(modes), "methods": methods, **how})
    return asked


def seconds(point: Point, rates: Rates) -> float:
    """Of one point; on a GPU by the stored launches, each way of launching being set up by itself."""
    n, methods, modes = point["matmul_n"], point["methods"].split(","), point["launched"].split(",")
    once = rates.matmul_s(n, n, n, point["dtype"]) + rates.all_reduce_s(point["comm_bytes"])
    sampled = sampled_s(2 * len(methods) * once, point["budget_s"], point["min_iterations"])
    return len(modes) * (sampled + (0.5 if is_cpu(rates) else 1.5)) + TUNE_ARMS * TUNE_RUNS * once


OVERLAP_EAGER = Dataset(
    name="overlap_eager",
    program="study.sections.overlap.measure_eager",
    method_version=2,
    schema=pa.DataFrameSchema(
        {
            **COMMON,
            "launched": pa.Column(str, pa.Check.isin(["graph", "eager"])),
            "method": pa.Column(str),
            # The all-reduce on the current stream, the matmul on the side stream.
            "leads": pa.Column(bool),
            "backend": pa.Column(str),
            "plan": pa.Column(str),
            "timing": pa.Column(str, pa.Check.isin(["graph", "backlog", "host", ""])),
            **{f"{name}{bound}_us": TIME for name in ("t_seq", "t_overlap") for bound in ("", "_lo", "_hi")},
            "speedup": TIME,
            "speedup_lo": RATIO,
            "speedup_hi": RATIO,
            # Of the samples: issued when the GPU had nothing left to do.
            "late_part": pa.Column(float, pa.Check.in_range(0, 1), nullable=True),
            "verdict": pa.Column(str, pa.Check.isin(["helps", "hurts", "undecided", ""])),
            "correct": pa.Column(bool),
        },
        strict=False,
        coerce=True,
    ),
    index=("configuration", "comm_bytes", "matmul_n", "launched", "method", "leads"),
    repeated=False,
    points=points,
    num_ranks=lambda parameters, machine: resolve_ranks(parameters.num_ranks, machine),
    unavailable=too_few_ranks,
    seconds=seconds,
)
