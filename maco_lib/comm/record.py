"""The record of each collective: who holds what, bandwidths, and the check of its result.

P is the number of ranks. S, the `bytes` of a collective, is the larger of a rank's two buffers, as in nccl-tests:

    collective       source     result     bus factor
    all_reduce       S          S          2 (P - 1) / P
    reduce_scatter   S          S / P      (P - 1) / P
    all_gather       S / P      S          (P - 1) / P
    all_to_all       S          S          (P - 1) / P
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
CHUNK = 2**22
LARGE = 2**24


@dataclass(frozen=True)
class Collective:
    """One kind of collective. `num_rounds`: how often each byte crosses the links; `*_is_share`: it holds S / P."""

    name: str
    num_rounds: int = 1
    source_is_share: bool = False
    result_is_share: bool = False
    sums: bool = False

    def bus_factor(self, num_ranks: int) -> float:
        """busbw / algbw: the least bytes that cross each rank's link, over S."""
        return self.num_rounds * (num_ranks - 1) / num_ranks

    def numels(self, numel: int, num_ranks: int) -> tuple[int, int]:
        """Elements of a rank's (source, result) when the larger has `numel`; ValueError if it does not divide."""
        if numel < 1:
            raise ValueError(f"{self.name} of {numel} elements")
        share = numel // num_ranks
        if self.name != "all_reduce" and share * num_ranks != numel:
            raise ValueError(f"{self.name}: {numel} elements cannot be divided among {num_ranks} ranks")
        return (share if self.source_is_share else numel), (share if self.result_is_share else numel)


COLLECTIVES = {
    collective.name: collective
    for collective in (
        Collective("all_reduce", num_rounds=2, sums=True),
        Collective("reduce_scatter", result_is_share=True, sums=True),
        Collective("all_gather", source_is_share=True),
        Collective("all_to_all"),
    )
}


def collective(name: str) -> Collective:
    """The record called `name`; raises ValueError with the valid names."""
    if name not in COLLECTIVES:
        raise ValueError(f"unknown collective {name!r}; the collectives are {', '.join(COLLECTIVES)}")
    return COLLECTIVES[name]


def algbw(num_bytes: float, seconds: float) -> float:
    """Algorithm bandwidth S / t in GB/s (1e9 bytes)."""
    return num_bytes / seconds / 1e9


def busbw(name: str, num_bytes: float, seconds: float, num_ranks: int) -> float:
    """Bus bandwidth in GB/s: algbw times the bus factor, comparable to the speed of a link at any number of ranks."""
    return algbw(num_bytes, seconds) * collective(name).bus_factor(num_ranks)


@dataclass
class Operation:
    """A collective on buffers of its own. `result is source` when it works in place.

    `launch(source, result, async_op)` issues it on the current stream; with `async_op` a host-driven backend returns
    its torch.distributed Work at once (stream-ordered ones never block and return None). Collective: all ranks run it.
    """

    collective: str
    source: torch.Tensor
    result: torch.Tensor
    launch: Callable[[torch.Tensor, torch.Tensor, bool], dist.Work | None] = field(repr=False)

    def run(self, async_op: bool = False) -> dist.Work | None:
        return self.launch(self.source, self.result, async_op)


def random_source(numel: int, dtype: torch.dtype, device: torch.device, rank: int, seed: int) -> torch.Tensor:
    """Normal numbers that any rank can draw again: what `rank` contributes. Same kind of device, same numbers."""
    source = torch.empty(numel, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed * 1009 + rank)
    for chunk in source.split(CHUNK):
        chunk.copy_(torch.randn(chunk.numel(), generator=generator, device=device))
    return source


class Reference:
    """Fresh random input of this rank and the right answer to it, in float64.

    (float32 for half types above 2^24 elements.) The answer is computed from the other ranks' seeds, so nothing under
    test takes part in it. Sums are right when every element is within P roundings of Σ|x|; moved data when equal.
    """

    def __init__(
        self, name: str, numel: int, dtype: torch.dtype, device: torch.device, rank: int, num_ranks: int, seed: int
    ):
        self.record = collective(name)
        source_numel, self.result_numel = self.record.numels(numel, num_ranks)
        share = slice(rank * (numel // num_ranks), (rank + 1) * (numel // num_ranks))
        wide = torch.float32 if dtype.itemsize == 2 and numel > LARGE else torch.float64
        total = magnitude = None
        pieces = []
        for other in range(num_ranks):
            theirs = random_source(source_numel, dtype, device, other, seed)
            if other == rank:
                self.source = theirs
            if name in ("reduce_scatter", "all_to_all"):
                theirs = theirs[share]
            if not self.record.sums:
                pieces.append(theirs.clone())
                continue
            theirs = theirs.to(wide)
            total = theirs.clone() if total is None else total.add_(theirs)
            magnitude = theirs.abs_() if magnitude is None else magnitude.add_(theirs.abs_())
        if self.record.sums:
            self.expected, self.bound = total, magnitude.mul_(num_ranks * torch.finfo(dtype).eps)
        else:
            self.expected, self.bound = torch.cat(pieces), None

    def error(self, result: torch.Tensor) -> str:
        """What is wrong with `result` on this rank, in one sentence; "" when it is right."""
        got = result.reshape(-1)
        if got.numel() != self.result_numel:
            return f"{self.record.name}: {got.numel()} elements instead of {self.result_numel}"
        if self.bound is None:
            right = got == self.expected
        else:
            right = (got.to(self.expected.dtype) - self.expected).abs_() <= self.bound
        num_wrong = got.numel() - int(right.sum())
        if num_wrong == 0:
            return ""
        first = int((~right).nonzero()[0])
        values = f"{got[first].item():g} instead of {self.expected[first].item():g}"
        return f"{self.record.name}: {num_wrong} of {got.numel()} elements are wrong, the first at {first}: {values}"


def poison(operation: Operation, source: torch.Tensor) -> None:
    """Set the input to `source`, and the output to NaN where it is another buffer."""
    operation.result.fill_(torch.nan)
    operation.source.copy_(source)


def check(operation: Operation, reference: Reference, run: Callable[[], object] | None = None) -> str:
    """Run the operation (or `run`, an arm that contains it) once on the reference's input; "" or what is wrong here.

    Collective: every rank calls it. Ask `timing.first_error` for the verdict of all ranks together.
    """
    poison(operation, reference.source)
    (run or operation.run)()
    return reference.error(operation.result)
