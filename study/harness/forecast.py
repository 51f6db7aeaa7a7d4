"""What measuring takes, for the sections' forecasts: samples as `timing.interleave` takes them, and what is around."""

from maco_lib.stats import num_samples
from study.harness.rates import Rates

MAX_SAMPLES = 200
# Runs of one candidate of `tune` and `tune_linear`, and the candidates on a CPU.
TUNE_RUNS, TUNE_ARMS = 5, 4


def sampled_s(round_s: float, budget_s: float, least: int, num_before: float = 2.0) -> float:
    """Seconds to sample arms that take `round_s` one after the other, `num_before` rounds of warming and checking
    included."""
    return (num_before + num_samples(budget_s / max(round_s, 1e-6), least, MAX_SAMPLES)) * round_s


def is_cpu(rates: Rates) -> bool:
    """Whether the ranks are on a CPU: only there fp16 is not measured."""
    return "fp16" not in rates.flops
