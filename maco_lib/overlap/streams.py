"""Run a computation and a collective side by side: `overlap` in one call, `start` for several in flight.

On GPUs the collective is issued on a side stream that starts where the current stream stands; `wait` makes the current
stream, not the host, wait for it, so everything can be captured in a CUDA graph. On CPUs gloo's thread does the work.

    result, total = overlap(lambda: x @ w, gradient)             # gradient is summed in place over the ranks
    result, total = overlap(lambda: x @ w, gradient, plan="auto")              # the fastest way on this machine
    handles = [start(tensor) for tensor in tensors]; ...; totals = [handle.wait() for handle in handles]
"""

import functools
from collections.abc import Callable, Hashable
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from maco_lib import comm
from maco_lib import context as contexts
from maco_lib.comm import c10d
from maco_lib.overlap import calls
from maco_lib.overlap.plan import Plan
from maco_lib.overlap.sm_limit import leaving
from maco_lib.overlap.validation import check_agreement, described, require_call, result_shape

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
            contexts.on(self.result.device).turns.awaited(self.event)
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.result


def side_stream(device: torch.device, priority: int) -> torch.cuda.Stream:
    """The stream for collectives of this device and priority, made once: those issued on it run in order."""
    return contexts.on(device).side_stream(priority)


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
    come (`context.Turns`). exclusive: it may not be left unawaited where a capture begins.
    """
    device = result.device
    if device.type != "cuda":
        return Handle(result, work=run(True))
    side, turns = side_stream(device, priority), contexts.on(device).turns
    side.wait_event(after or turns.current().record_event())
    with contexts.Within(side, turns):
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
    turns = contexts.on(result.device).turns
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
    fork = contexts.on(result.device).turns.current().record_event() if forks else None
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
    contexts.on(device).spare_element().zero_()
    return compute()


def run_leading(compute: Callable[[], R], run: Run, device: torch.device) -> R:
    """The collective in the current stream, `compute()` on a side stream that starts where the current one stands."""
    here = contexts.on(device)
    turns, current, side = here.turns, here.turns.current(), here.side_stream(0)
    turns.take()
    fork, join = here.fork_and_join()
    fork.record(current)
    side.wait_event(fork)
    run(False)
    turns.give()
    try:
        with contexts.Within(side, turns):
            computed = compute()
    finally:
        join.record(side)
        current.wait_event(join)
    # What it returned is the side stream's memory, and used here.
    for leaf in (computed,) if isinstance(computed, torch.Tensor) else tree_leaves(computed):
        if isinstance(leaf, torch.Tensor) and leaf.is_cuda:
            leaf.record_stream(current)
    return computed


def start(
    tensor: torch.Tensor,
    collective: str = "all_reduce",
    group: dist.ProcessGroup | None = None,
    *,
    priority: int = 0,
    check: bool = False,
    plan: Plan | None = None,
) -> Handle:
    """Start a collective on `tensor` and return its `Handle`; every rank of the group calls it, in the same order.

    tensor: contiguous, floating point, on the group's kind of device. collective and result, for shape (n, ...):
        all_reduce      (n, ...)      sums in place, the result is `tensor` itself
        reduce_scatter  (n / P, ...)  this rank's share of the sum, a new tensor
        all_gather      (P n, ...)    the ranks' tensors one after the other, a new tensor
        all_to_all      (n, ...)      the P-th parts sent to this rank, a new tensor
    group: None for all ranks. A group of one, and no process group at all: the result is `tensor` itself, at once.
    priority: of the side stream, on GPUs; lower is more urgent (`highest_priority()`).
    check: first compare collective, shape, type and plan across the ranks (blocks the host, not for captured code).
    plan: for an all-reduce, the backend and stream that run it. A tensor from `comm.symmetric_empty` is summed where it
        lies, any other is copied into symmetric memory and back.

    On a GPU collectives run one after the other, whatever streams they are issued from (`context.Turns`).

    Raises ValueError on an unknown collective, a wrong device, layout, type or shape, and a plan that cannot be
    followed here (nothing else is run in its place): here alone, but with `check` on every rank, and there also when
    the ranks disagree.
    """
    require = functools.partial(require_call, tensor, collective, group, plan, priority, computes=False)
    if check:
        check_agreement(lambda: described(tensor, collective, require()[1]), group)
    num_ranks, plan = require()
    if num_ranks == 1:
        return Handle(tensor)
    if plan is not None:
        return launch_planned(plan, planned_all_reduce(plan, tensor, group), tensor)
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
    plan: Plan | Literal["auto"] | None = None,
    key: Hashable = None,
) -> tuple[R, torch.Tensor]:
    """Run `compute()` while a collective works on `tensor`: (what compute returned, the collective's result).

    compute: takes nothing, must not touch `tensor`; it is run once, whatever the plan. The rest as in `start`. On
    return both are ordered before whatever the current stream does next. When `compute` raises, the collective is
    waited for before the error goes on.

    plan: None for the default collective on a side stream (which begins after a computation where the GPU has work
    queued: then "auto", or a `Plan` that leads, is faster); a `Plan`; or "auto", for an all-reduce: the fastest plan of
    this machine, sequential where overlapping does not pay. The first calls for a `key` measure: how long `compute`
    takes alone, then a few plans, one in each call, and the host waits for each call before the next. One of them takes
    up to a minute if this machine was never calibrated (`calibrate`). After some 50 calls the plan is settled
    (`decisions()`). Inside the capture of a CUDA graph nothing is measured: call `tune` before, else the model decides
    from what is known of the key at other sizes, else it is sequential.
    key: names the computation for "auto", equal on every rank; None: where `compute` is defined. Give one if the same
    code does work of different size. The size and type of `tensor` are part of it anyhow.
    """
    known = None
    if collective == "all_reduce" and not (check or priority) and (plan == "auto" or plan is not None and key is None):
        known = calls.key_of("overlap", plan, tensor) if callable(compute) else None
        if found := calls.found(tensor, group, known):
            context, record = found
            if plan == "auto":
                return record.run(compute, tensor, key), tensor
            return run_plan(record, compute, issue_of(record, tensor, context.group), tensor), tensor
    require = functools.partial(require_call, tensor, collective, group, plan, priority, key=key, compute=compute)
    if check:
        check_agreement(lambda: described(tensor, collective, require()[1], key), group)
    if plan is None and key is None:
        require()
        handle = start(tensor, collective, group, priority=priority)
        try:
            computed = compute()
        finally:
            total = handle.wait()
        return computed, total
    num_ranks, plan = require()
    if num_ranks == 1:
        return compute(), tensor
    record = plan
    if plan == "auto":
        from maco_lib.overlap.auto import planner  # it measures through this module

        record = planner(group, tensor.device)
    if known is not None:
        contexts.of(group, tensor.device).calls.keep(known, record)
    if plan == "auto":
        return record.run(compute, tensor, key), tensor
    return run_plan(plan, compute, planned_all_reduce(plan, tensor, group), tensor), tensor


def planned_all_reduce(plan: Plan, tensor: torch.Tensor, group: dist.ProcessGroup | None) -> Run:
    """The all-reduce of `tensor` over the plan's backend, to be issued with `async_op`."""
    return functools.partial(comm.all_reduce, tensor, plan.backend, group or dist.group.WORLD)


def issue_of(plan: Plan, tensor: torch.Tensor, group: dist.ProcessGroup) -> Run:
    """As `planned_all_reduce`, of a tensor and a plan that were found to be valid; it takes no turn itself."""
    if not tensor.numel():
        return lambda async_op: None
    return functools.partial(comm.backend(plan.backend).all_reduce, tensor, group)
