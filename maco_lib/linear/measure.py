"""Measure any plan of `linear_all_reduce` on a shape, as `timing.interleave` does.

Each run multiplies with another copy of the weight, as a model's next layer has another one: so many that a GPU's L2
cache holds half of them at most. Copies make no difference where one sample is one long run.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist

from maco_lib.linear.execute import execute
from maco_lib.linear.plan import LinearPlan
from maco_lib.overlap.plan import DEFAULT_BACKEND
from maco_lib.timing import MAX_REPEATS, Arm, first_error, interleave, median_us

COLD_BYTES = 2**26  # on CPUs


def cold_bytes(device: torch.device) -> int:
    """As many as no cache holds."""
    return 2 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else COLD_BYTES


class Shape:
    """x (num_rows, K) of random numbers, and copies of `weight` (N, K), as arms."""

    def __init__(self, num_rows: int, weight: torch.Tensor, group: dist.ProcessGroup):
        self.num_rows, self.weight, self.group = num_rows, weight, group
        self.x = torch.randn(num_rows, weight.shape[1], device=weight.device).to(weight.dtype)
        num_copies = min(MAX_REPEATS, -(-cold_bytes(weight.device) // max(1, weight.nbytes)))
        self.weights = itertools.cycle([weight, *(weight.clone() for _ in range(num_copies - 1))])

    @property
    def default(self) -> LinearPlan:
        return LinearPlan(backend=DEFAULT_BACKEND[self.x.device.type])

    def run(self, plan: LinearPlan, weight: torch.Tensor | None = None) -> torch.Tensor:
        weight = next(self.weights) if weight is None else weight
        return execute(plan, self.x, weight, None, None, self.group)[0]

    def fault(self, plan: LinearPlan) -> str:
        """Why the plan cannot be followed here or is wrong on some rank, or ""; its buffers are then made. Collective.

        Compared to the default plan, whose sums are NCCL's or gloo's.
        """
        try:
            expected = self.run(self.default, self.weight).float()
            distance, norm = float((self.run(plan, self.weight).float() - expected).norm()), float(expected.norm())
            bound = 2 * self.group.size() * torch.finfo(self.x.dtype).eps * norm  # 0 where the weight is
            error = "" if distance <= bound else f"{plan}: differs from {self.default} by {distance:.1e} of {norm:.1e}"
        except Exception as refused:  # also a compiler's that Triton does not find: the other ranks wait to be told
            error = f"{plan}: {type(refused).__name__}: {refused}"
        return first_error(error, self.group)

    def times_us(self, plans: Sequence[LinearPlan], **options) -> tuple[float, dict[LinearPlan, float]]:
        """(of the matmul alone, of each plan): medians of the slowest rank, the same on every rank. Collective."""
        matmul = Arm("matmul", lambda: torch.nn.functional.linear(self.x, next(self.weights)))
        arms = [Arm(str(plan), lambda plan=plan: self.run(plan)) for plan in plans]
        timings = interleave([matmul, *arms], group=self.group, device=self.x.device, **options)
        return median_us(timings["matmul"]), {plan: median_us(timings[str(plan)]) for plan in plans}
