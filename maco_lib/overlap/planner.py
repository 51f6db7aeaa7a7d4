"""`plan="auto"`: find the fastest plan for a computation and an all-reduce on the user's own calls, or by `tune`.

One `Trial` for each key: each call runs one plan of a stage (`search`), in turn. When every one was timed, the ranks
compare the times of the slowest rank and go on to the next stage; after the last they keep one plan. The user's
computation is run once a call all along.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
import torch.distributed as dist

from maco_lib import comm
from maco_lib import state as states
from maco_lib.comm import symmetric
from maco_lib.overlap import execute, search, sm_limit
from maco_lib.overlap.plan import MARGIN, Decision, Plan, captured, choose, record, sequential
from maco_lib.overlap.trust import fault
from maco_lib.overlap.validation import check_agreement, described, require_call
from maco_lib.state import State
from maco_lib.timing import SLEEP_CYCLES_PER_US, Arm, Barrier, first_error, gather, interleave, median_us
from maco_lib.turns import capturing

R = TypeVar("R")
# A call that is timed on a GPU is issued behind a kernel that takes so long: what is timed is the GPU, not the host.
ISSUE_US = 500
Mark = torch.cuda.Event | float


def name_of(compute: Callable, key: Hashable) -> str:
    """The name of the computation: `key`, or where the code of `compute` is."""
    if key is not None:
        return str(key)
    while isinstance(compute, functools.partial):
        compute = compute.func
    code = getattr(compute, "__code__", None)
    named = compute if hasattr(compute, "__qualname__") else type(compute)
    return f"{named.__module__}.{named.__qualname__}" + (f":{code.co_firstlineno}" if code else "")


def mark(device: torch.device) -> Mark:
    """Now: an event in the current stream, or the host's clock on a CPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_us(begin: Mark, end: Mark) -> float:
    """Time between two marks; the host waits for the later one."""
    if isinstance(begin, float):
        return (end - begin) * 1e6
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


class Trial:
    """The calls of one key until its plan is chosen; every rank goes through the same ones."""

    def __init__(
        self,
        decision: Decision,
        group: dist.ProcessGroup,
        device: torch.device,
        backends: list[str],
        budget_s: float = math.inf,
    ):
        self.decision, self.group, self.device = decision, group, device
        self.reserves = device.type == "cuda" and not sm_limit.unavailable(max(search.RESERVED), device)
        self.barrier = Barrier(group, device)
        self.stage = search.first_look(device.type, backends, self.reserves)
        self.later = [
            lambda times_us: search.closer_look(device.type, times_us, self.reserves),
            lambda times_us: search.final(device.type, times_us, budget_s),
        ]
        self.turn = 0
        self.times_us: dict[Plan, list[float]] = {plan: [] for plan in self.stage.plans}
        self.running: tuple[Plan, Mark, Mark] | None = None

    def next_plan(self) -> Plan | None:
        """The plan of the call to come, None once one is chosen. Collective at the end of a stage."""
        self.collect()
        while self.turn == self.stage.num_rounds * len(self.stage.plans):
            self.conclude()
            if self.decision.chosen is not None:
                return None
        return self.stage.plans[self.turn % len(self.stage.plans)]

    def collect(self) -> None:
        """Take the time of the call before, which is waited for."""
        if self.running is not None:
            (plan, begin, end), self.running = self.running, None
            self.times_us[plan].append(elapsed_us(begin, end))

    def conclude(self) -> None:
        """End a stage: the times of the slowest rank, then the next stage, or the choice. Collective."""
        measure = min if self.later else statistics.median
        mine = [measure(self.times_us[plan][1:] or [math.inf]) for plan in self.stage.plans]
        slowest = map(max, zip(*gather(mine, self.group), strict=True))
        of_stage = dict(zip(self.stage.plans, slowest, strict=True))
        if self.later:
            self.decision.measured_us |= of_stage
            self.stage, self.turn = self.later.pop(0)(self.decision.measured_us), 0
            self.times_us = {plan: [] for plan in self.stage.plans}
        else:
            self.decision.measured_us = of_stage
            self.decision.chosen = choose(of_stage, self.device.type)

    def run(self, plan: Plan, compute: Callable[[], R], issue: execute.Run, tensor: torch.Tensor) -> R:
        """One call under `plan`, between two marks; the ranks begin it together."""
        self.turn += 1
        if self.device.type == "cuda":
            torch.cuda._sleep(ISSUE_US * SLEEP_CYCLES_PER_US)
        self.barrier()
        begin = mark(self.device)
        computed = execute.run_plan(plan, compute, issue, tensor)
        self.running = (plan, begin, mark(self.device))
        return computed


class Planner:
    """The keys of one group on one device."""

    def __init__(self, state: State):
        self.state, self.device = state, state.device
        self.trials: dict[tuple, Trial] = {}
        self.unmeasured: dict[tuple, Decision] = {}

    @property
    def group(self) -> dist.ProcessGroup:
        return self.state.group

    def identify(self, compute: Callable, tensor: torch.Tensor, key: Hashable) -> tuple[str, int, str, bool]:
        """What has a plan of its own: (name, bytes, type, whether the tensor is in symmetric memory)."""
        return name_of(compute, key), tensor.nbytes, str(tensor.dtype), in_symmetric_memory(tensor, self.group)

    def decide(self, which: tuple, how: str) -> Decision:
        name, num_bytes, dtype, _ = which
        return record(Decision(name, num_bytes, dtype, self.group.size(), how))

    def trial(self, which: tuple, tensor: torch.Tensor, how: str, budget_s: float = math.inf) -> Trial:
        """A new trial. Collective; RuntimeError if the default all-reduce cannot sum such a tensor."""
        decision, backends = self.decide(which, how), self.backends(tensor)
        self.trials[which] = Trial(decision, self.group, self.device, backends, budget_s)
        return self.trials[which]

    def backends(self, tensor: torch.Tensor) -> list[str]:
        """Those that every rank has, whose sums are right, and that take such a tensor. Collective.

        The first sum over a backend makes its buffers and kernels, which is not the user's call's to wait for.
        """
        scratch, default = torch.zeros_like(tensor), sequential(self.device.type).backend
        errors = {
            name: error or first_error(refusal(name, scratch, self.group), self.group)
            for name, error in self.state.get(faults).items()
        }
        if errors[default]:
            raise RuntimeError(f"{default}, the default all-reduce, fails: {errors[default]}")
        return [name for name, error in errors.items() if not error]

    def run(self, compute: Callable[[], R], tensor: torch.Tensor, key: Hashable) -> R:
        """The user's call: what `compute` returned, `tensor` being summed. Collective."""
        if not tensor.numel():
            return compute()
        which = self.identify(compute, tensor, key)
        trial, issue = self.trials.get(which), functools.partial(execute.issue_of, tensor=tensor, group=self.group)
        if capturing(self.device):
            chosen = trial and (trial.decision.captured or trial.decision.chosen)
            chosen = chosen or self.unmeasured_plan(which)
            return execute.run_plan(chosen, compute, issue(chosen), tensor)
        trial = trial or self.trial(which, tensor, "calls")
        plan = None if trial.decision.chosen else trial.next_plan()
        if plan is None:
            chosen = trial.decision.chosen
            return execute.run_plan(chosen, compute, issue(chosen), tensor)
        return trial.run(plan, compute, issue(plan), tensor)

    def unmeasured_plan(self, which: tuple) -> Plan:
        """The plan where nothing may be measured: that of the nearest size at which the computation is known.

        A graph cannot make buffers: only of a tensor that is no smaller; and no new symmetric tensor. Else sequential.
        """
        name, num_bytes, dtype, in_place = which
        known = [
            trial.decision
            for (its_name, its_bytes, its_dtype, _), trial in self.trials.items()
            if (its_name, its_dtype) == (name, dtype) and its_bytes >= num_bytes and trial.decision.chosen
        ]
        nearest = min(known, key=lambda decision: decision.num_bytes, default=None) if not in_place else None
        chosen = (nearest.captured or nearest.chosen) if nearest else sequential(self.device.type)
        decision = self.unmeasured.get(which)
        if decision is None or decision.chosen != chosen:
            decision = self.unmeasured[which] = self.decide(which, "captured unmeasured")
            decision.chosen = chosen
        return chosen

    def tune(self, compute: Callable[[], object], tensor: torch.Tensor, key: Hashable, budget_s: float) -> Decision:
        """`tune`, for tensors and groups that are valid."""
        which, before = self.identify(compute, tensor, key), tensor.clone()
        trial = self.trial(which, tensor, "tune", budget_s)
        decision = trial.decision
        while (plan := trial.next_plan()) is not None:
            refill(tensor, before)
            trial.run(plan, compute, execute.issue_of(plan, tensor, self.group), tensor)
        decision.captured = decision.chosen
        if self.device.type == "cuda":
            plans = list(decision.measured_us)
            plans += [plan for plan in captured(plans) if plan not in plans]
            timings = interleave(
                [self.arm(plan, compute, tensor, before) for plan in plans],
                group=self.group,
                device=self.device,
                budget_s=budget_s,
                min_iterations=10,
            )
            times_us = {plan: median_us(timings[str(plan)]) for plan in plans}
            decision.captured = choose(times_us, self.device.type, aside_margin=MARGIN)
        refill(tensor, before)
        return decision

    def arm(self, plan: Plan, compute: Callable[[], object], tensor: torch.Tensor, before: torch.Tensor) -> Arm:
        issue = execute.planned_all_reduce(plan, tensor, self.group)
        run = functools.partial(execute.run_plan, plan, compute, issue, tensor)
        return Arm(str(plan), run, lambda: refill(tensor, before))


def faults(state: State) -> dict[str, str]:
    """Of every all-reduce that all ranks have, why its sums cannot be trusted, "" where they are right. Collective."""
    group, device = state.group, state.device
    everywhere = set.intersection(*map(set, gather(comm.available("all_reduce", device, group), group)))
    return {name: fault(name, device, group) for name in comm.BACKENDS if name in everywhere}


def in_symmetric_memory(tensor: torch.Tensor, group: dist.ProcessGroup) -> bool:
    """Whether `tensor` is in symmetric memory, where most backends sum it without a copy."""
    return tensor.device.type == "cuda" and symmetric.memory(group, tensor.device).find(tensor) is not None


def refill(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Also of a tensor that was made in inference mode, which nothing may write to outside."""
    with torch.inference_mode(tensor.is_inference()):
        tensor.copy_(values)


def refusal(backend: str, scratch: torch.Tensor, group: dist.ProcessGroup) -> str:
    """Why the backend does not sum such a tensor, or "", it then being ready for the next. Collective."""
    try:
        work = comm.all_reduce(scratch, backend, group, False)
    except Exception as error:  # also a compiler's that Triton does not find: the other ranks wait to be told
        return f"{type(error).__name__}: {error}"
    if work is not None:
        work.wait()
    return ""


def planner(group: dist.ProcessGroup | None, device: torch.device) -> Planner:
    """The planner of a group on this rank's device; it lives as long as the group."""
    return states.of(group, device).get(Planner)


def tune(
    compute: Callable[[], object],
    tensor: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    key: Hashable = None,
    budget_s: float = 0.2,
) -> Plan:
    """Find the plan that `overlap(compute, tensor, plan="auto")` will follow, at once. Collective.

    Runs `compute` as often as `overlap` would measure it, at most some 200 times (`search.most_calls`), so it must bear
    repetition; `tensor` is as before when this returns. On GPUs it then replays the best as CUDA graphs for about
    `budget_s` seconds, without the host, which is what captured code will see. Returns the plan of captured code; eager
    code follows `decisions()[-1].chosen`. A group of one, or a tensor without elements, gets the sequential plan.
    Raises ValueError as `overlap` with `check`.
    """
    require = functools.partial(require_call, tensor, "all_reduce", group, "auto", 0, compute=compute)
    check_agreement(lambda: described(tensor, "all_reduce", require()[1], key), group)
    num_ranks, _ = require()
    if num_ranks == 1 or not tensor.numel():
        return sequential(tensor.device.type)
    return planner(group, tensor.device).tune(compute, tensor, key, budget_s).captured
