"""Measure what `LinearCosts` holds, and any plan of `linear_all_reduce` on a shape, as `timing.interleave` does.

Each run multiplies with another copy of the weight, as a model's next layer has another one: so many that a GPU's L2
cache holds half of them at most. Copies make no difference where one sample is one long run.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist

from maco_lib.kernels.decode_tiles import MAX_ROWS
from maco_lib.overlap.costs import Curve
from maco_lib.overlap.left_out import without
from maco_lib.overlap.linear_matmul import MatmulTime
from maco_lib.overlap.linear_model import MIN_POINTS, LinearCosts, Overlapped
from maco_lib.overlap.linear_plan import LinearPlan, candidates
from maco_lib.overlap.linear_techniques.chunked import cut
from maco_lib.overlap.linear_techniques.problem import EVERYTHING, Problem
from maco_lib.overlap.measure import Grid, median_us
from maco_lib.overlap.plan import DEFAULT_BACKEND
from maco_lib.timing import MAX_REPEATS, Arm, first_error, interleave

# The type that is measured, and those that take as long.
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
ALIKE = {"cuda": (torch.bfloat16, torch.float16), "cpu": (torch.float32,)}
COLD_BYTES = 2**26  # on CPUs
COLUMNS = 4096


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
        from maco_lib.overlap.linear import operator  # which asks the planner, which asks this

        weight = next(self.weights) if weight is None else weight
        return operator(self.x, weight, None, None, self.group.group_name, plan.name)

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


def measure_linear(device: torch.device, group: dist.ProcessGroup, backends: Sequence[str], grid: Grid) -> LinearCosts:
    """What the plans over these backends cost on this machine. Collective."""
    dtype, kind = DTYPE[device.type], device.type
    curves = {name: {} for name in backends}
    for num_bytes in sorted(grid.sizes):
        arms = [arm for name in backends for arm in summing(name, num_bytes, dtype, device, group)]
        for name, timing in interleave(arms, group=group, device=device, budget_s=grid.budget_s).items():
            curves[name][num_bytes] = median_us(timing)
    all_reduce = {
        name: Curve(tuple(map(float, times)), tuple(times.values())) for name, times in curves.items() if times
    }
    overlapping = [plan for plan in candidates(kind, all_reduce) if plan.overlapped]
    unusable: dict[str, str] = {}
    t_matmul: dict[tuple[int, int, int], float] = {}
    found: dict[LinearPlan, list[tuple[tuple[int, int, int], float]]] = {plan: [] for plan in overlapping}
    for shape in (*grid.linear, *grid.matmuls):
        m, n, k = shape
        problem = Shape(m, torch.randn(n, k, device=device).to(dtype), group)
        plans = overlapping if shape in grid.linear else [LinearPlan("decode")]
        plans = [plan for plan in plans if plan in found and str(plan) not in unusable and cuts(plan, m)]
        faults = {plan: problem.fault(plan) for plan in plans}
        unusable |= {str(plan): why for plan, why in faults.items() if why}
        plans = [plan for plan in plans if not faults[plan]]
        t_matmul[shape], times = problem.times_us(plans, budget_s=grid.budget_s)
        for plan, us in times.items():
            found[plan].append((shape, us))
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if kind == "cuda" else 0
    matmul = MatmulTime.fit(list(t_matmul), list(t_matmul.values()), num_sms, dtype.itemsize)
    costs = LinearCosts(group.size(), tuple(map(str, ALIKE[kind])), matmul, all_reduce, {}, unusable)
    unseen = {}
    for index, shape in enumerate(t_matmul):
        others = without(index, list(t_matmul), list(t_matmul.values()))
        unseen[shape] = MatmulTime.fitted(*others, num_sms, dtype.itemsize)(*shape)
    for plan, points in found.items():
        if len(points) >= MIN_POINTS and str(plan) not in unusable:
            sides = []
            for m, n, k in (shape for shape, _ in points):
                t_comm = costs.comm_times(m * n * dtype.itemsize)
                t_comm_us = t_comm.get(plan.backend, min(t_comm.values()))
                sides.append(costs.sides(plan, m, n, k, t_matmul[m, n, k], t_comm_us))
            costs.overlapped[plan] = Overlapped.fit(
                sides, [us for _, us in points], [unseen[shape] for shape, _ in points]
            )  # fmt: skip
    return costs


def cuts(plan: LinearPlan, num_rows: int) -> bool:
    """Whether the plan is one for so many rows: they make as many chunks as it says, and are not too many for it."""
    if plan.technique == "decode":
        return num_rows <= MAX_ROWS
    return plan.technique != "chunked" or len(cut(num_rows, plan.num_chunks)) == plan.num_chunks


def summing(name: str, num_bytes: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup) -> list[Arm]:
    """From where a matmul leaves its product to the result, over the backend `name`; none if it takes no such one."""
    numel = num_bytes // dtype.itemsize
    result = torch.zeros(max(1, numel // COLUMNS), min(numel, COLUMNS), dtype=dtype, device=device)
    problem = Problem(result, result, None, None, result, name, group)  # multiplies nothing
    source = torch.randn_like(result)

    def run() -> None:
        problem.sum(block)
        problem.finish(block)

    try:
        (block,) = problem.blocks([EVERYTHING])
        block.source.zero_()
        run()
    except ValueError:
        return []
    return [Arm(name, run, lambda: block.product.copy_(source))]
