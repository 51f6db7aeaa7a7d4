"""Run a computation and a collective side by side: `overlap` in one call, `start` for several in flight.

On GPUs the collective is issued on a side stream that starts where the current stream stands; `wait` makes the current
stream, not the host, wait for it, so everything can be captured in a CUDA graph. On CPUs gloo's thread does the work.

    result, total = overlap(lambda: x @ w, gradient)             # gradient is summed in place over the ranks
    handles = [start(tensor) for tensor in tensors]; ...; totals = [handle.wait() for handle in handles]
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from maco_lib.comm import DTYPES, c10d, collective

R = TypeVar("R")


class Handle:
    """A collective in flight. `wait()` returns its result: don't read it, or write the input, before."""

    def __init__(self, result: torch.Tensor, work: dist.Work | None = None, event: torch.cuda.Event | None = None):
        self.result = result
        self.work = work
        self.event = event

    def wait(self) -> torch.Tensor:
        """The result: on a GPU at once, ordered before what the current stream does next; on a CPU when it is there.

        May be called again. Raises RuntimeError when the collective failed on a CPU.
        """
        if self.event is not None:
            torch.cuda.current_stream(self.result.device).wait_event(self.event)
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.result


@functools.cache
def side_stream(device: torch.device, priority: int) -> torch.cuda.Stream:
    """The stream for collectives of this device and priority, made once: those issued on it run in order."""
    return torch.cuda.Stream(device, priority=priority)


def highest_priority() -> int:
    """The priority of the most urgent streams of this GPU (a negative number)."""
    return torch.cuda.Stream.priority_range()[1]


def launch(
    run: Callable[[bool], dist.Work | None],
    result: torch.Tensor,
    *,
    used: tuple[torch.Tensor, ...] = (),
    priority: int = 0,
    after: torch.cuda.Event | None = None,
) -> Handle:
    """Issue `run(async_op)` beside the current stream; `result` and `used` are the tensors that it touches.

    On GPUs it begins once what the current stream holds is done, or at the earlier event `after`.
    """
    if result.device.type != "cuda":
        return Handle(result, work=run(True))
    side = side_stream(result.device, priority)
    side.wait_event(after or torch.cuda.current_stream(result.device).record_event())
    with torch.cuda.stream(side):
        run(False)
    # Memory freed while the side stream still uses it must not be handed out again by the allocator.
    for tensor in (result, *used):
        tensor.record_stream(side)
    return Handle(result, event=side.record_event())


def start(
    tensor: torch.Tensor,
    collective: str = "all_reduce",
    group: dist.ProcessGroup | None = None,
    *,
    priority: int = 0,
    check: bool = False,
) -> Handle:
    """Start a collective on `tensor` and return its `Handle`; every rank of the group calls it, in the same order.

    tensor: contiguous, floating point, on the group's kind of device. collective and result, for shape (n, ...):
        all_reduce      (n, ...)      sums in place, the result is `tensor` itself
        reduce_scatter  (n / P, ...)  this rank's share of the sum, a new tensor
        all_gather      (P n, ...)    the ranks' tensors one after the other, a new tensor
        all_to_all      (n, ...)      the P-th parts sent to this rank, a new tensor
    group: None for all ranks. A group of one, and no process group at all: the result is `tensor` itself, at once.
    priority: of the side stream, on GPUs; lower is more urgent (`highest_priority()`).
    check: first compare shape and type across the ranks (blocks the host, not for captured code).

    Raises ValueError on an unknown collective, a wrong device, layout, type or shape, and with `check` on every rank
    when the ranks disagree.
    """
    num_ranks = validate(tensor, collective, group)
    if num_ranks == 1:
        return Handle(tensor)
    if check:
        check_agreement(tensor, collective, group)
    shape = result_shape(collective, tensor.shape, num_ranks)
    result = tensor if collective == "all_reduce" else tensor.new_empty(shape)
    issue = functools.partial(c10d.issue, collective, tensor, result, group)
    return launch(issue, result, used=(tensor,), priority=priority)


def overlap(
    compute: Callable[[], R],
    tensor: torch.Tensor,
    collective: str = "all_reduce",
    group: dist.ProcessGroup | None = None,
    *,
    priority: int = 0,
    check: bool = False,
) -> tuple[R, torch.Tensor]:
    """Run `compute()` while a collective works on `tensor`: (what compute returned, the collective's result).

    compute: takes nothing, must not touch `tensor`. The rest as in `start`. On return both are ordered before whatever
    the current stream does next. When `compute` raises, the collective is waited for before the error goes on.
    """
    handle = start(tensor, collective, group, priority=priority, check=check)
    try:
        computed = compute()
    finally:
        total = handle.wait()
    return computed, total


def validate(tensor: torch.Tensor, name: str, group: dist.ProcessGroup | None) -> int:
    """The number of ranks; raises ValueError naming what is wrong with the call on this rank."""
    collective(name)
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} takes a torch.Tensor, not {type(tensor).__name__}")
    if tensor.dtype not in DTYPES.values():
        raise ValueError(f"{name} of {tensor.dtype}; the types are {', '.join(map(str, DTYPES.values()))}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} needs a contiguous tensor; shape {tuple(tensor.shape)} has strides {tensor.stride()}")
    num_ranks = dist.get_world_size(group) if dist.is_initialized() else 1
    if num_ranks < 1:
        raise ValueError(f"rank {dist.get_rank()} is not in the group given to {name}")
    if num_ranks == 1:
        return num_ranks
    kinds = device_kinds(group)
    if tensor.device.type not in kinds:
        where = " or ".join(kinds)
        raise ValueError(f"tensor is on {tensor.device}, but the {dist.get_backend(group)} group works on {where}")
    result_shape(name, tensor.shape, num_ranks)
    return num_ranks


def device_kinds(group: dist.ProcessGroup | None) -> list[str]:
    """Device types the group has a backend for here; "cuda" only where there is a GPU."""
    kinds = [entry.split(":")[0] for entry in dist.get_backend_config(group).split(",")]
    return [kind for kind in kinds if kind != "cuda" or torch.cuda.is_available()]


def result_shape(name: str, shape: torch.Size, num_ranks: int) -> tuple[int, ...]:
    """Shape of the result of each rank; ValueError when its first dimension cannot be divided."""
    if name == "all_reduce":
        return tuple(shape)
    if not shape:
        raise ValueError(f"{name} needs a tensor of at least one dimension")
    if name in ("reduce_scatter", "all_to_all") and shape[0] % num_ranks:
        raise ValueError(f"{name}: the first dimension of {tuple(shape)} cannot be divided among {num_ranks} ranks")
    first = {"reduce_scatter": shape[0] // num_ranks, "all_gather": shape[0] * num_ranks, "all_to_all": shape[0]}[name]
    return (first, *shape[1:])


def check_agreement(tensor: torch.Tensor, name: str, group: dist.ProcessGroup | None) -> None:
    """Raise ValueError on every rank unless all call the same collective with the same shape and type. Collective."""
    described: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(described, f"{name} of {tuple(tensor.shape)} {tensor.dtype}", group=group)
    for rank, theirs in enumerate(described):
        if theirs != described[0]:
            raise ValueError(f"the ranks disagree: rank 0 calls {described[0]}, rank {rank} calls {theirs}")
