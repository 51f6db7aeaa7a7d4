"""What a technique of `linear_all_reduce` says of itself. Without torch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Argument:
    """What a plan says beside its technique and backend, and how its name writes it.

    field: of `LinearPlan`, "num_chunks" (a number) or "tiling" (a word). word: what stands for it in forms of names.
    accepts(value): whether it is one; values: those that are, in words. read: its value by what a name says.
    """

    field: str
    word: str
    accepts: Callable[[Any], bool]
    values: str
    read: Callable[[str], Any] = str


@dataclass(frozen=True)
class Technique:
    """A way to run a matmul and the all-reduce of its result: `TECHNIQUE` of a file of `linear.techniques`.

    name: what plans call it. run(problem, plan) fills `problem.result`; collective. candidates(kind, backends): names
    of the plans by it that "auto" chooses from on a `kind` of device ("cpu" or "cuda") with these backends.
    argument: None where there is nothing more to say. It follows the technique in a plan's name, before the backend;
    one that may be left out, as its field's default is accepted, is for techniques without a backend.
    takes_backend: whether it sums over a backend, else by itself. place: among the techniques where they are listed.
    covers(plan, num_rows): whether the plan is one of its own for so many rows, not the same as another.
    suits(layer, backends): whether it has kernels for weights (layer.n, layer.k) of layer.dtype (`planner.Layer`).
    """

    name: str
    run: Callable[[Any, Any], None]
    candidates: Callable[[str, list[str]], Iterable[str]]
    argument: Argument | None = None
    takes_backend: bool = True
    place: float = float("inf")
    covers: Callable[[Any, int], bool] = lambda plan, num_rows: True
    suits: Callable[[Any, list[str]], bool] = lambda layer, backends: True

    def form(self, default: Any) -> str:
        """Of its plans' names, as "chunked:NUMBER[:BACKEND]"; `default` of the argument's field."""
        said = f":{self.argument.word}" if self.argument else ""
        optional = self.argument and self.argument.accepts(default)
        return self.name + (f"[{said}]" if optional else said) + "[:BACKEND]" * self.takes_backend
