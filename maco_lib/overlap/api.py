"""Run a computation and a collective side by side: `overlap` in one call, `start` for several in flight.

result, total = overlap(lambda: x @ w, gradient)             # gradient is summed in place over the ranks
result, total = overlap(lambda: x @ w, gradient, plan="auto")              # the fastest way on this machine
handles = [start(tensor) for tensor in tensors]; ...; totals = [handle.wait() for handle in handles]
"""

import functools
from collections.abc import Callable, Hashable
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from maco_lib import state as states
from maco_lib.comm import c10d
from maco_lib.overlap import calls
from maco_lib.overlap.execute import Handle, issue_of, launch, launch_planned, planned_all_reduce, run_plan
from maco_lib.overlap.plan import Plan
from maco_lib.overlap.planner import planner
from maco_lib.overlap.validation import check_agreement, described, require_call, result_shape

R = TypeVar("R")


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

    On a GPU collectives run one after the other, whatever streams they are issued from (`turns.Turns`).

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
    this machine, sequential where overlapping does not pay. The first calls for a `key` measure (`search`): one plan in
    each call, on a GPU issued behind 0.5 ms of nothing, and the host waits for each call before the next. The first of
    all tries every all-reduce, and compiles those that are compiled. After at most 250 calls on GPUs, 60 on CPUs, the
    plan is settled (`decisions()`). Inside the capture of a CUDA graph nothing is measured: call `tune` before, else it
    is the plan of the nearest larger tensor of the key, else sequential.
    key: names the computation for "auto", equal on every rank; None: where `compute` is defined. Give one if the same
    code does work of different size. The size and type of `tensor` are part of it anyhow.
    """
    known = None
    if collective == "all_reduce" and not (check or priority) and (plan == "auto" or plan is not None and key is None):
        known = calls.key_of("overlap", plan, tensor) if callable(compute) else None
        if found := calls.found(tensor, group, known):
            state, record = found
            if plan == "auto":
                return record.run(compute, tensor, key), tensor
            return run_plan(record, compute, issue_of(record, tensor, state.group), tensor), tensor
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
        record = planner(group, tensor.device)
    if known is not None:
        states.of(group, tensor.device).calls.keep(known, record)
    if plan == "auto":
        return record.run(compute, tensor, key), tensor
    return run_plan(plan, compute, planned_all_reduce(plan, tensor, group), tensor), tensor
