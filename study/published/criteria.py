"""When a published claim counts as reproduced: the verdicts, the criteria, and the ratios they are applied to; and what
this study's own techniques are meant to reach.

"reproduced": the statement, and where it names a ratio that ratio or more, holds for what was measured here.
"not reproduced": it was measured and does not hold. "not testable here": what it speaks of was not or cannot be
measured on this machine. Absolute times and rates of other hardware are compared, never judged.
"""

from dataclasses import dataclass

REPRODUCED, NOT_REPRODUCED, NOT_TESTABLE = "reproduced", "not reproduced", "not testable here"

RATIO_TOLERANCE = 0.05
BANDWIDTH_TOLERANCE = 0.10
HIGH_BENEFIT = 1.05
NVLINK_SHARE = 0.5

CRITERIA = {
    "speedup": "a printed speedup is reproduced if the measured 95 % interval lies above 1 and reaches the printed "
    f"ratio less {RATIO_TOLERANCE:.0%}; more than printed counts as reproduced. Section 1 is judged in the published "
    "protocol with the published technique, two streams.",
    "scaling": "overlap scales with workload size if the interval of each of the two configurations with the larger "
    "matmul lies above those of the other two.",
    "bandwidth": "a printed bandwidth is reproduced if the measured interval of 2 S / t touches it "
    f"± {BANDWIDTH_TOLERANCE:.0%} (it is printed with “~”).",
    "NVLink": "“consistent with NVLink” is reproduced if the printed busbw at the largest size is at least "
    f"{NVLINK_SHARE:.0%} of what the default backend reaches over NVLink; without NVLink it is not testable.",
    "benefit": "a benefit is high where the medians of the possible gain (sequential ÷ ideal) and of the predicted "
    f"gain both reach {HIGH_BENEFIT:.2f}×, otherwise low. The gains are upper bounds: as if a layer's every matmul "
    "could hide its all-reduces, and by medians: how many predictions are certain is told beside. One group gains more "
    f"than another if its median predicted gain is more than {RATIO_TOLERANCE:.0%} higher.",
    "reason": "a reason for vLLM's speedup is reproduced if the arm that has it is faster than the arm that lacks it, "
    "the interval of the ratio above 1. Compilation and CUDA graphs are switched together; a reason that comes with "
    "more than that in every pair of arms is not testable.",
    "latency": "latencies and rates of the published machine are compared, not judged.",
}


@dataclass(frozen=True)
class Target:
    """What the techniques of section 1 are meant to reach, over the published configurations and in the bandwidth.

    fraction_of_ideal: in each configuration. mean_speedup: over sequential NCCL. busbw_gb_per_s: of an all-reduce of
    LARGE_BYTES. latency_us: of one of SMALL_BYTES, at most.
    """

    fraction_of_ideal: float
    mean_speedup: float
    busbw_gb_per_s: float
    latency_us: float


# By the number of GPUs; each to be shown in so many process launches.
TARGETS = {2: Target(0.95, 1.65, 330.0, 8.0), 4: Target(0.93, 1.5, 320.0, 8.0)}
TARGET_LAUNCHES = 3
SMALL_BYTES, LARGE_BYTES = 8 * 2**10, 32 * 2**20
# From this T_seq / ideal on there is enough to gain for a fraction of it to be told from noise.
LEAST_IDEAL_GAIN = 1.05
# The planner may be this much slower than the best, and a matmul so much slower when SMs are taken from it.
PLANNER_TOLERANCE = 0.02
FREE_SLOWDOWN = 0.02

# What matmul + all-reduce as one operation is meant to reach: fraction of ideal by the number of GPUs from so many rows
# on, and up to so few of them the speedup of the chain with residual and RMSNorm over sequential NCCL; how much slower
# than a peer or the fastest sequential arm it may be; and its error over that of cuBLAS and NCCL.
LINEAR_TARGETS = {2: 0.90, 4: 0.85}
LINEAR_MANY_ROWS, LINEAR_FEW_ROWS = 2048, 256
LINEAR_CHAIN_SPEEDUP = 1.3
LINEAR_TOLERANCE = 0.02
LINEAR_ERROR = 1.2
# Memory that an allocator may still take on after its buffers have their sizes: a leak of a result a call is far more.
LINEAR_GROWTH_BYTES = 2**26


@dataclass(frozen=True)
class Ratio:
    """A measured ratio of two times with its 95 % interval, and both times for the reader."""

    value: float
    low: float
    high: float
    times: str

    def __str__(self) -> str:
        return f"{self.value:.2f}× [{self.low:.2f}, {self.high:.2f}] ({self.times})"


Finding = tuple[str, str]


def milliseconds(value: float) -> str:
    """Three digits, in the unit that fits: 0.0621 -> "62.1 µs"."""
    if value >= 1000:
        return f"{value / 1000:.3g} s"
    return f"{value:.3g} ms" if value >= 1 else f"{value * 1000:.3g} µs"


def decide(holds: bool) -> str:
    return REPRODUCED if holds else NOT_REPRODUCED


def reaches(ratio: Ratio, printed: float) -> bool:
    """The criterion "speedup"."""
    return ratio.low > 1 and ratio.high >= printed * (1 - RATIO_TOLERANCE)
