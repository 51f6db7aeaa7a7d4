"""Run a computation and a collective side by side as a plan says.

On GPUs the collective is issued on a side stream that starts where the current stream stands; `Handle.wait` makes the
current stream, not the host, wait for it, so everything can be captured in a CUDA graph. On CPUs gloo's thread does
the work.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from maco_lib import comm
from maco_lib import state as states
from maco_lib.overlap.plan import Plan
from maco_lib.overlap.sm_limit import leaving
from maco_lib.turns import Within

R = TypeVar("R")
Run = Callable[[bool], dist.Work | None]


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
            states.on(self.result.device).turns.awaited(self.event)
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.result


def side_stream(device: torch.device, priority: int) -> torch.cuda.Stream:
    """The stream for collectives of this device and priority, made once: those issued on it run in order."""
    return states.on(device).side_stream(priority)


def highest_priority() -> int:
    """The priority of the most urgent streams of this GPU (a negative number)."""
    return torch.cuda.Stream.priority_range()[1]


def launch(
    run: Run,
    result: torch.Tensor,
    *,
    used: tuple[torch.Tensor, ...] = (),
    priority: int = 0,
    after: torch.cuda.Event | None = None,
    exclusive: bool = False,
) -> Handle:
    """Issue `run(async_op)` beside the current stream; `result` and `used` are the tensors that it touches.

    On GPUs it begins once what the current stream holds is done, or at the earlier event `after`, and when its turn has
    come (`turns.Turns`). exclusive: it may not be left unawaited where a capture begins.
    """
    device = result.device
    if device.type != "cuda":
        return Handle(result, work=run(True))
    side, turns = side_stream(device, priority), states.on(device).turns
    side.wait_event(after or turns.current().record_event())
    with Within(side, turns):
        turns.take()
        run(False)
        turns.give()
    # Memory freed while the side stream still uses it must not be handed out again by the allocator.
    for tensor in (result, *used):
        tensor.record_stream(side)
    event = side.record_event()
    if exclusive:
        turns.unawaited = event
    return Handle(result, event=event)


def launch_planned(
    plan: Plan,
    run: Run,
    result: torch.Tensor,
    used: tuple[torch.Tensor, ...] = (),
    after: torch.cuda.Event | None = None,
) -> Handle:
    """`launch` as `plan` says; in the current stream, done when this returns on a CPU, if it does not overlap."""
    on_gpu = result.device.type == "cuda"
    if plan.overlapped:
        priority = highest_priority() if plan.urgent and on_gpu else 0
        return launch(run, result, used=used, priority=priority, after=after, exclusive=True)
    turns = states.on(result.device).turns
    turns.take()
    run(False)
    turns.give()
    return Handle(result)


def run_plan(
    plan: Plan, compute: Callable[[], R], run: Run, result: torch.Tensor, used: tuple[torch.Tensor, ...] = ()
) -> R:
    """Run `compute()` and the collective `run(async_op)` as `plan` says, and join them: what `compute` returned.

    When `compute` raises, the collective is run and waited for all the same before the error goes on.
    """
    if plan.leaves and result.device.type == "cuda":
        compute = functools.partial(run_leaving, compute, plan.leaves, result.device)
    if plan.leads and result.device.type == "cuda":
        if not (plan.leaves or torch.cuda.is_current_stream_capturing()):
            compute = functools.partial(run_held_back, compute, result.device)
        return run_leading(compute, run, result.device)
    forks = plan.overlapped and result.device.type == "cuda"
    fork = states.on(result.device).turns.current().record_event() if forks else None
    issue = functools.partial(launch_planned, plan, run, result, used, fork)
    handle = None if plan.overlapped and plan.compute_first else issue()
    try:
        return compute()
    finally:
        (handle or issue()).wait()


def run_leaving(compute: Callable[[], R], num_sms: int, device: torch.device) -> R:
    with leaving(num_sms, device):
        return compute()


def run_held_back(compute: Callable[[], R], device: torch.device) -> R:
    """`compute()` behind a kernel that does nothing.

    Where eager code has just joined two streams, both go on at the same moment, and a matmul that then gets its SMs a
    few µs before a collective lets it begin at its own end only (table `overlap_eager`): one launch more decides that.
    """
    states.on(device).spare_element().zero_()
    return compute()


def run_leading(compute: Callable[[], R], run: Run, device: torch.device) -> R:
    """The collective in the current stream, `compute()` on a side stream that starts where the current one stands."""
    here = states.on(device)
    turns, current, side = here.turns, here.turns.current(), here.side_stream(0)
    turns.take()
    fork, join = here.fork_and_join()
    fork.record(current)
    side.wait_event(fork)
    run(False)
    turns.give()
    try:
        with Within(side, turns):
            computed = compute()
    finally:
        join.record(side)
        current.wait_event(join)
    # What it returned is the side stream's memory, and used here.
    for leaf in (computed,) if isinstance(computed, torch.Tensor) else tree_leaves(computed):
        if isinstance(leaf, torch.Tensor) and leaf.is_cuda:
            leaf.record_stream(current)
    return computed


def planned_all_reduce(plan: Plan, tensor: torch.Tensor, group: dist.ProcessGroup | None) -> Run:
    """The all-reduce of `tensor` over the plan's backend, to be issued with `async_op`."""
    return functools.partial(comm.all_reduce, tensor, plan.backend, group or dist.group.WORLD)


def issue_of(plan: Plan, tensor: torch.Tensor, group: dist.ProcessGroup) -> Run:
    """As `planned_all_reduce`, of a tensor and a plan that were found to be valid; it takes no turn itself."""
    if not tensor.numel():
        return lambda async_op: None
    return functools.partial(comm.backend(plan.backend).all_reduce, tensor, group)
