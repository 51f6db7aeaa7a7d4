"""One point of section 1 as things to run: its tensors, its arms, and whether each computes the right thing."""

import functools
import random
from collections.abc import Callable

import torch

from maco_lib import comm
from maco_lib.overlap import execute
from maco_lib.overlap.plan import Plan, decisions
from maco_lib.overlap.planner import tune
from maco_lib.timing import Arm, decided, first_error, synchronize
from study.harness.worker import Context
from study.sections.overlap.methods import DEFAULT_BACKEND, HOST_WAITS, METHODS

NUM_CHECKED_ROWS = 128


class Problem:
    """An n×n matmul and an all-reduce of `comm_bytes`, on random normal data that is new in every process and point.

    `operations[backend]`: the all-reduce over each usable backend, and `unusable[backend]`: why not. The planner's are
    called "auto" and, in eager code, "auto, eager": of a tensor of the user's, in symmetric memory where the machine
    has it.
    """

    def __init__(self, point: dict, context: Context):
        self.context, self.device, self.group = context, context.device, context.group
        self.protocol, self.default = point.get("protocol", "device"), DEFAULT_BACKEND[context.device.type]
        self.dtype = comm.DTYPES[point["dtype"]]
        n, self.numel = point["matmul_n"], point["comm_bytes"] // self.dtype.itemsize
        self.a = torch.randn(n, n, device=self.device).to(self.dtype)
        self.b = torch.randn(n, n, device=self.device).to(self.dtype)
        self.product = torch.empty_like(self.a)
        rows = torch.randperm(n)[:NUM_CHECKED_ROWS].to(self.device)
        self.checked_rows, self.expected_rows = rows, self.a[rows].double() @ self.b.double()
        seed = decided(random.getrandbits(32), self.group)
        rank, num_ranks = context.rank, context.num_ranks
        self.reference = comm.Reference("all_reduce", self.numel, self.dtype, self.device, rank, num_ranks, seed)
        self.operations: dict[str, comm.Operation] = {}
        self.unusable: dict[str, str] = {}

    def use(self, backend: str) -> str:
        """Make the all-reduce over `backend` ready; "" or why it cannot be used here. Collective."""
        self.context.step()
        if backend not in self.operations and backend not in self.unusable:
            why = first_error(self.why_not(backend), self.group)
            if not why:
                try:
                    operation = comm.backend(backend).operation(
                        "all_reduce", self.numel, self.dtype, self.device, self.group
                    )
                except (RuntimeError, ValueError) as error:
                    why = str(error)
                why = first_error(why, self.group)
            if why:
                self.unusable[backend] = why
            else:
                self.operations[backend] = operation
        return self.unusable.get(backend, "")

    def why_not(self, backend: str) -> str:
        """Why this rank cannot use `backend`, or ""."""
        if backend not in comm.BACKENDS:
            return f"this version has no backend {backend!r}"
        return comm.backend(backend).unavailable("all_reduce", self.device, self.group) or ""

    def matmul(self) -> None:
        torch.mm(self.a, self.b, out=self.product)

    def restore(self, backend: str) -> Callable[[], object] | None:
        """Undo what an in-place sum did to its data; None for an all-reduce out of place."""
        operation = self.operations[backend]
        in_place = operation.result is operation.source
        return (lambda: operation.source.copy_(self.reference.source)) if in_place else None

    def backend(self, plan: Plan) -> str:
        """The backend that runs `plan` here."""
        return plan.on(self.device.type).backend

    def plan(self, name: str) -> Plan:
        """The plan of the method called `name`, everything said; "auto" is tuned for, see `tuned`. Collective."""
        method = METHODS[self.protocol][name]
        return self.tuned["auto"] if method == "auto" else method.on(self.device.type)

    @functools.cached_property
    def tuned(self) -> dict[str, Plan]:
        """What the planner chooses, for a tensor of the user's: "auto" for captured code, "auto, eager" for eager code.

        Collective.
        """
        tensor = self.users_tensor()
        tensor.copy_(self.reference.source)
        plans = {"auto": tune(self.matmul, tensor, self.group), "auto, eager": decisions()[-1].chosen}
        self.operations |= {name: self.users_all_reduce(tensor, plan.backend) for name, plan in plans.items()}
        return plans

    def users_all_reduce(self, tensor: torch.Tensor, backend: str) -> comm.Operation:
        """`comm.all_reduce` of the user's own tensor."""
        return comm.Operation(
            "all_reduce",
            tensor,
            tensor,
            lambda source, result, async_op: comm.all_reduce(result, backend, self.group, async_op),
        )

    def users_tensor(self) -> torch.Tensor:
        """Where a user who cares puts the tensor; the memory is kept for the points to come."""
        kept, need = self.context.state.get("symmetric"), self.numel * self.dtype.itemsize
        if self.device.type != "cuda" or comm.symmetric.unreachable(self.device, self.group):
            return torch.empty(self.numel, dtype=self.dtype, device=self.device)
        if kept is None or kept.numel() < need:
            capacity = 1 << (need - 1).bit_length()
            kept = comm.symmetric_empty((capacity,), torch.uint8, self.device, self.group)
            self.context.state["symmetric"] = kept
        return kept[:need].view(self.dtype)

    def communication(self, backend: str) -> Arm:
        return Arm(f"comm:{backend}", self.operations[backend].run, self.restore(backend))

    def planned(self, name: str, plan: Plan, backend: str = "") -> Arm:
        """The all-reduce and the matmul as `plan` says; `backend`: whose operation, where it is not the plan's own."""
        backend = backend or self.backend(plan)
        operation = self.operations[backend]
        used = (operation.source,)
        run = functools.partial(execute.run_plan, plan, self.matmul, operation.run, operation.result, used)
        return Arm(name, run, self.restore(backend))

    def sequential(self, name: str, backend: str) -> Arm:
        """The all-reduce over `backend`, then the matmul, in stream order."""
        return self.planned(name, Plan(backend, overlapped=False))

    def waiting(self, name: str) -> Arm:
        """The published sequential arm: the host waits between the two steps."""
        operation = self.operations[self.default]

        def run() -> None:
            operation.run()
            synchronize(self.device)
            self.matmul()

        return Arm(name, run, self.restore(self.default))

    def arm(self, name: str) -> Arm:
        """The arm of the method called `name` in this point's protocol."""
        if (self.protocol, name) in HOST_WAITS:
            return self.waiting(name)
        automatic = METHODS[self.protocol][name] == "auto"
        return self.planned(name, self.plan(name), "auto" if automatic else "")

    def error(self, arm: Arm, backend: str | None, computes: bool) -> str:
        """Run `arm` once on poisoned outputs: "" on every rank, or the first rank's finding on every rank."""
        self.context.step()
        self.product.fill_(torch.nan)
        try:
            if backend is None:
                arm.run()
                found = ""
            else:
                found = comm.check(self.operations[backend], self.reference, arm.run)
            if computes and not found:
                found = self.matmul_error()
        except RuntimeError as error:
            found = f"{type(error).__name__}: {error}"
        return first_error(found, self.group)

    def matmul_error(self) -> str:
        """Relative error of random rows against float64, and that every element was written."""
        synchronize(self.device)
        if not torch.isfinite(self.product).all():
            return "matmul: elements were not written"
        difference = self.product[self.checked_rows].double() - self.expected_rows
        relative = float(difference.norm() / self.expected_rows.norm())
        # One rounding of the result, and float32 accumulation of n products (errors add up like a random walk).
        num_products = self.a.shape[1]
        bound = 2 * torch.finfo(self.dtype).eps + num_products**0.5 * torch.finfo(torch.float32).eps
        return "" if relative <= bound else f"matmul: relative error {relative:.2g} is above {bound:.2g}"
