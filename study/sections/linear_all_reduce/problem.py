"""One point of section 5: its operands, what the results have to be, and the memory that the all-reduces work in."""

import random
from collections.abc import Callable

import torch
import torch.distributed as dist

from maco_lib import comm
from maco_lib.linear.plan import LinearPlan
from maco_lib.timing import decided, first_error, gather
from study.harness.worker import Context

EPS = 1e-6
NUM_CHECKED_ROWS = 128
# A replay of runs that together take about so long, so that no launch of a graph is timed; at most so many runs.
REPLAY_US = 300.0
MAX_RUNS = 16
# Rates for that guess, nothing else depends on them: matmul, memory, link.
FLOP_PER_US, BYTES_PER_US, LINK_BYTES_PER_US = 6e8, 4e6, 3e5

Outputs = tuple[torch.Tensor, ...]
Run = Callable[[int], Outputs]


class Problem:
    """x (m, k / P) @ weight (n, k / P).T summed over the ranks; random normal data, new in every process and point.

    `weights`: so many, different ones, that a run never finds its own in the L2 cache, as in a model, where other
    layers come between; a run takes the next, so that an old result is no right one. `num_runs`: runs in a timed
    sample of every arm. Results are of order 1.
    """

    def __init__(self, point: dict, context: Context):
        self.context, self.device, self.group = context, context.device, context.group
        self.m, self.n, self.dtype = point["m"], point["n"], comm.DTYPES[point["dtype"]]
        share = point["k"] // context.num_ranks
        self.num_runs, num_weights = 1, 1
        weight_bytes = self.n * share * self.dtype.itemsize
        if self.device.type == "cuda":
            traffic = 2 * self.m * self.n * self.dtype.itemsize / LINK_BYTES_PER_US + weight_bytes / BYTES_PER_US
            about_us = 5 + traffic + 2 * self.m * self.n * share / FLOP_PER_US
            self.num_runs = max(1, min(MAX_RUNS, round(REPLAY_US / about_us)))
            num_weights = min(self.num_runs, max(2, -(-2 * self.cache_bytes // weight_bytes)))
        self.x = self.normal(self.m, share)
        self.weights = [self.normal(self.n, share, scale=point["k"] ** -0.5) for _ in range(num_weights)]
        self.product = self.x @ self.weights[0].t()
        # The same on every rank.
        same = torch.Generator(self.device).manual_seed(decided(random.getrandbits(32), self.group))
        self.residual = self.normal(self.m, self.n, generator=same)
        self.norm_weight = self.normal(self.n, scale=0.1, generator=same) + 1
        self.rows = torch.randperm(self.m, generator=same, device=self.device)[:NUM_CHECKED_ROWS]
        self.operations: dict[str, comm.Operation] = {}
        self.chosen: dict[str, LinearPlan] = {}  # by the planner, for its methods

    def normal(self, *shape: int, scale: float = 1.0, generator: torch.Generator | None = None) -> torch.Tensor:
        values = torch.randn(shape, device=self.device, generator=generator)
        return values.mul_(scale).to(self.dtype)

    @property
    def cache_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).L2_cache_size

    @property
    def num_sms(self) -> int:
        cuda = self.device.type == "cuda"
        return torch.cuda.get_device_properties(self.device).multi_processor_count if cuda else 0

    def chill(self) -> None:
        """Before a timed sample: drive the weights out of the cache, and what a layer before this one wrote into it."""
        if self.device.type != "cuda":
            return
        if "spill" not in self.context.state:
            self.context.state["spill"] = torch.zeros(2 * self.cache_bytes // 4, device=self.device)
        for tensor in (self.context.state["spill"], self.residual, self.x):
            torch.sum(tensor)

    def operation(self, backend: str) -> comm.Operation:
        """The all-reduce of the product over `backend`, on memory that it sums without a copy. Collective.

        Raises ValueError or RuntimeError, with the reason, where it cannot be used here.
        """
        if backend not in self.operations:
            if backend not in comm.BACKENDS:
                raise ValueError(f"this version has no backend {backend!r}")
            entry = comm.backend(backend)
            if why := first_error(entry.unavailable("all_reduce", self.device, self.group) or "", self.group):
                raise ValueError(why)
            numel = self.m * self.n
            self.operations[backend] = entry.operation("all_reduce", numel, self.dtype, self.device, self.group)
        return self.operations[backend]

    def refill(self, operation: comm.Operation) -> None:
        """Before an all-reduce alone: a product where it sums."""
        operation.source.copy_(self.product.view(-1))

    # -- what is right ----------------------------------------

    def expect(self) -> None:
        """Compute, without anything that is under test: the sum in float32 with its bounds, checked rows in float64."""
        self.sums = {number: self.sum_of(number) for number in sorted({0, self.last})}
        self.exact = self.x[self.rows].double() @ self.weights[0].double().t()
        dist.all_reduce(self.exact, group=self.group)
        self.exact_total = self.exact + self.residual[self.rows].double()
        mean_square = self.exact_total.square().mean(1, keepdim=True)
        self.exact_normed = self.exact_total * (mean_square + EPS).rsqrt() * self.norm_weight.double()

    @property
    def last(self) -> int:
        """The weight of the last run in a timed sample."""
        return (self.num_runs - 1) % len(self.weights)

    def sum_of(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """With that weight: the sum over the ranks in float32, and how far from it a right result can be."""
        total = (self.x @ self.weights[number].t()).float()
        bound = total.abs()
        for tensor in (total, bound):
            dist.all_reduce(tensor, group=self.group)
        # Each rank's product is rounded, and so is each sum; float32 inside, over k products of results of order 1.
        inside = 2 * self.x.shape[1] * torch.finfo(torch.float32).eps
        return total, bound.mul_((self.context.num_ranks + 1) * torch.finfo(self.dtype).eps).add_(inside)

    def judge(self, run: Run) -> tuple[str, float, bool]:
        """(what is wrong or "", relative error against float64 of the checked rows, equal bits on every rank).

        A sum is judged whole, each element; the rows after a norm as such. Collective: one verdict for all ranks.
        """
        error, relative, equal = "", float("nan"), False
        self.context.step()
        try:
            self.leave_wrong_results(run)
            outputs = tuple(output.clone() for output in run(0))
            chain = len(outputs) == 2
            error = self.sum_error(outputs[-1], chain, *self.sums[0])
            exact = self.exact_normed if chain else self.exact
            relative = float((outputs[0][self.rows].double() - exact).norm() / exact.norm())
            if not error and not relative <= self.relative_bound:
                error = f"relative error {relative:.2g} is above {self.relative_bound:.2g}"
        except (RuntimeError, ValueError, ImportError, AttributeError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        error = first_error(error, self.group)
        if not error:
            equal = all(gather(all(map(self.equal_on_every_rank, outputs)), self.group))
            relative = max(gather(relative, self.group))
        return error, relative, equal

    def leave_wrong_results(self, run: Run) -> None:
        """What lies in memory from runs of the same data must not pass for the next one's: run it on -x."""
        self.x.neg_()
        try:
            run(0)
        finally:
            self.x.neg_()

    def judge_timed(self, outputs: list[Outputs], again: Callable[[], object]) -> str:
        """What is wrong on this rank with the last result of a timed sample, as `again` takes one, or "".

        outputs: where a sample leaves that result. On -x and then on x: see `leave_wrong_results`. Runs that follow
        each other at once, as in a replay, can be wrong where those that are issued one by one are right.
        """
        (total, bound), errors = self.sums[self.last], []
        for sign in (-1, 1):
            self.x.neg_()
            again()
            self.context.step()
            errors.append(self.sum_error(outputs[-1][-1], len(outputs[-1]) == 2, sign * total, bound))
        return next((f"timed: {error}" for error in errors if error), "")

    @property
    def relative_bound(self) -> float:
        return (self.context.num_ranks + 2) * torch.finfo(self.dtype).eps

    def sum_error(self, result: torch.Tensor, with_residual: bool, expected: torch.Tensor, bound: torch.Tensor) -> str:
        """What is wrong with a sum on this rank, to be `expected` plus the residual or not, or ""."""
        if tuple(result.shape) != (self.m, self.n) or result.dtype != self.dtype:
            return f"a result of {tuple(result.shape)}, {result.dtype}"
        if with_residual:
            residual = self.residual.float()
            expected, bound = expected + residual, bound + 2 * torch.finfo(self.dtype).eps * residual.abs()
        wrong = ~((result.float() - expected).abs_() <= bound)
        num_wrong = int(wrong.sum())
        if not num_wrong:
            return ""
        row, column = wrong.nonzero()[0].tolist()
        values = f"{result[row, column].item():g} instead of {expected[row, column].item():g}"
        return f"{num_wrong} of {result.numel()} elements are wrong, the first at ({row}, {column}): {values}"

    def equal_on_every_rank(self, output: torch.Tensor) -> bool:
        theirs = output.clone()
        dist.broadcast(theirs, dist.get_global_rank(self.group, 0), group=self.group)
        return torch.equal(theirs, output)
