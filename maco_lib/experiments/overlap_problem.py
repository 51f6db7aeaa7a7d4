"""One point of section 1 as things to run: its tensors, its arms, and whether each computes the right thing."""

import functools
import random
from collections.abc import Callable

import torch

from maco_lib import comm
from maco_lib.experiments.overlap_methods import DEFAULT_BACKEND, METHODS, Method
from maco_lib.experiments.worker import Context
from maco_lib.overlap import streams
from maco_lib.timing import Arm, decided, first_error, synchronize

NUM_CHECKED_ROWS = 128


class Problem:
    """An n×n matmul and an all-reduce of `comm_bytes`, on random normal data that is new in every process and point.

    `operations[backend]`: the all-reduce over each usable backend, and `unusable[backend]`: why not.
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
        if backend not in self.operations and backend not in self.unusable:
            entry = comm.backend(backend)
            why = first_error(entry.unavailable("all_reduce", self.device, self.group) or "", self.group)
            if not why:
                try:
                    operation = entry.operation("all_reduce", self.numel, self.dtype, self.device, self.group)
                except (RuntimeError, ValueError) as error:
                    why = str(error)
                why = first_error(why, self.group)
            if why:
                self.unusable[backend] = why
            else:
                self.operations[backend] = operation
        return self.unusable.get(backend, "")

    def matmul(self) -> None:
        torch.mm(self.a, self.b, out=self.product)

    def restore(self, backend: str) -> Callable[[], object] | None:
        """Undo what an in-place sum did to its data; None for an all-reduce out of place."""
        operation = self.operations[backend]
        in_place = operation.result is operation.source
        return (lambda: operation.source.copy_(self.reference.source)) if in_place else None

    def backend(self, method: Method) -> str:
        return method.backend or self.default

    def communication(self, backend: str) -> Arm:
        return Arm(f"comm:{backend}", self.operations[backend].run, self.restore(backend))

    def sequential(self, name: str, backend: str, host_wait: bool = False) -> Arm:
        """The all-reduce, then the matmul, in stream order."""
        operation = self.operations[backend]

        def run() -> None:
            operation.run()
            if host_wait:
                synchronize(self.device)
            self.matmul()

        return Arm(name, run, self.restore(backend))

    def overlapped(self, name: str, method: Method) -> Arm:
        """The all-reduce on a side stream (or gloo's thread), the matmul beside it, joined at the end."""
        operation = self.operations[self.backend(method)]
        priority = streams.highest_priority() if method.urgent and self.device.type == "cuda" else 0

        def run() -> None:
            launch = functools.partial(
                streams.launch, operation.run, operation.result, used=(operation.source,), priority=priority
            )
            if method.matmul_first:
                fork = torch.cuda.current_stream(self.device).record_event()
                self.matmul()
                launch(after=fork).wait()
            else:
                handle = launch()
                self.matmul()
                handle.wait()

        return Arm(name, run, self.restore(self.backend(method)))

    def arm(self, name: str) -> Arm:
        """The arm of the method called `name` in this point's protocol."""
        method = METHODS[self.protocol][name]
        if method.overlapped:
            return self.overlapped(name, method)
        return self.sequential(name, self.backend(method), method.host_wait)

    def error(self, arm: Arm, backend: str | None, computes: bool) -> str:
        """Run `arm` once on poisoned outputs: "" on every rank, or the first rank's finding on every rank."""
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
