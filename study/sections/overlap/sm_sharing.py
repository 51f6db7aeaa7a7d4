"""The table `sm_sharing` of section 1: a matmul's time when SMs (or a CPU's cores) are taken from it; one device."""

import pandera.pandas as pa

from study.harness.forecast import is_cpu, sampled_s
from study.harness.machine import Machine
from study.harness.memory import too_few_ranks
from study.harness.rates import PUBLISHED_DTYPE, Rates
from study.harness.spec import Dataset, Point, SectionParameters

TECHNIQUES = {"cuda": ("held", "sm_target", "carveout", "green_context"), "cpu": ("threads",)}
EVERY = [name for names in TECHNIQUES.values() for name in names]


def points(parameters: SectionParameters, machine: Machine) -> list[Point]:
    """Each of the machine's techniques at each n, in the device protocol; a point names a type other than bf16."""
    how = {"budget_s": parameters.budget_s, "min_iterations": parameters.min_iterations}
    if parameters.dtype != PUBLISHED_DTYPE:
        how["dtype"] = parameters.dtype
    techniques = TECHNIQUES[machine.kind]
    return [{"matmul_n": n, "technique": technique, **how} for technique in techniques for n in parameters.sm_sharing_n]


def seconds(point: Point, rates: Rates) -> float:
    """Of one technique; on a GPU by the stored launches, which hold SMs in 26 ways."""
    n, dtype = point["matmul_n"], point.get("dtype", PUBLISHED_DTYPE)
    num_ways = 2 if is_cpu(rates) else 26
    once = rates.matmul_s(n, n, n, dtype)
    return 0.5 + 0.02 * num_ways + sampled_s(num_ways * once, point["budget_s"], point["min_iterations"])


TIME = pa.Column(float, pa.Check.gt(0), nullable=True)
SM_SHARING = Dataset(
    name="sm_sharing",
    program="study.sections.overlap.measure_sm_sharing",
    method_version=2,
    schema=pa.DataFrameSchema(
        {
            "point_key": pa.Column(str),
            "matmul_n": pa.Column(int, pa.Check.gt(0)),
            "asked": pa.Column(str, pa.Check.isin(EVERY)),
            "technique": pa.Column(str, pa.Check.isin([*EVERY, "alone"])),
            "num_sms": pa.Column(int, pa.Check.ge(0)),
            # Of the time of the matmul alone; 1 for what lasts as long as the matmul does.
            "hold_part": pa.Column(float, pa.Check.in_range(0, 1)),
            "t_comp_us": TIME,
            "t_comp_lo_us": TIME,
            "t_comp_hi_us": TIME,
            "timing": pa.Column(str),
            "correct": pa.Column(bool),
            "error": pa.Column(str),
            "num_launches": pa.Column(int, pa.Check.ge(1)),
        },
        strict=False,
        coerce=True,
    ),
    index=("matmul_n", "asked", "technique", "num_sms", "hold_part"),
    points=points,
    seconds=seconds,
    num_ranks=lambda parameters, machine: 1,
    # One device is enough to measure it, but not for the section that it explains.
    unavailable=too_few_ranks,
    launches=lambda parameters, point: 1,
)
