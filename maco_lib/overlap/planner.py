"""`plan="auto"`: find the fastest plan for a computation and an all-reduce on the user's own calls, or by `tune`.

One `Trial` for each key. Its first calls are sequential and tell how long the computation takes alone; the calibrated
model then names a few candidates; each further call runs one of them, in turn. When every one was measured, the ranks
compare the medians of the slowest rank, once, and keep one. The user's computation is run once a call all along.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
import torch.distributed as dist

from maco_lib import state as states
from maco_lib.overlap import execute
from maco_lib.overlap.calibration import Calibration, calibrate
from maco_lib.overlap.measure import in_symmetric_memory, median_us
from maco_lib.overlap.plan import Decision, Plan, captured, choose, record, sequential, shortlist
from maco_lib.overlap.validation import check_agreement, described, require_call
from maco_lib.state import State
from maco_lib.timing import Arm, first_error, gather, interleave
from maco_lib.turns import capturing

R = TypeVar("R")
# Sequential calls before the candidates', and rounds over the candidates; the first of each warms up, not counted.
FIRST_CALLS = 3
ROUNDS = 6
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

    def __init__(self, decision: Decision, kind: str):
        self.decision, self.kind = decision, kind
        self.candidates: list[Plan] = []
        self.num_calls = 0
        self.t_comp_us: list[float] = []
        self.times_us: dict[Plan, list[float]] = {}
        self.running: tuple[Plan, list[Mark]] | None = None

    def collect(self) -> None:
        """Take the times of the call before, which is waited for."""
        if self.running is not None:
            plan, marks = self.running
            self.running = None
            if self.candidates:
                self.times_us[plan].append(elapsed_us(marks[0], marks[-1]))
            else:
                self.t_comp_us.append(elapsed_us(marks[1], marks[2]))

    def run(self, plan: Plan, compute: Callable[[], R], issue: execute.Run, tensor: torch.Tensor) -> R:
        """One call under `plan`, with marks at its begin and end, and around a sequential plan's computation."""
        marks = [mark(tensor.device)]

        def marked() -> R:
            marks.append(mark(tensor.device))
            computed = compute()
            marks.append(mark(tensor.device))
            return computed

        self.num_calls += 1
        computed = execute.run_plan(plan, compute if plan.overlapped else marked, issue, tensor)
        marks.append(mark(tensor.device))
        self.running = (plan, marks)
        return computed

    def next_plan(self) -> Plan | None:
        """The plan of the call to come; None when all are measured."""
        if not self.candidates:
            return sequential(self.kind)
        turn = self.num_calls - FIRST_CALLS
        return self.candidates[turn % len(self.candidates)] if turn < ROUNDS * len(self.candidates) else None

    def medians_us(self) -> dict[Plan, float]:
        """Of each candidate; inf where its calls failed."""
        return {plan: statistics.median(times[1:] or [math.inf]) for plan, times in self.times_us.items()}


class Planner:
    """The keys of one group on one device. `calibration` is None until a call that may measure."""

    def __init__(self, state: State):
        self.state, self.device = state, state.device
        self.calibration: Calibration | None = None
        self.trials: dict[tuple, Trial] = {}
        self.foretold: dict[tuple, Decision] = {}

    @property
    def group(self) -> dist.ProcessGroup:
        return self.state.group

    def identify(self, compute: Callable, tensor: torch.Tensor, key: Hashable) -> tuple[str, int, str, bool]:
        """What has a plan of its own: (name, bytes, type, whether the tensor is in symmetric memory)."""
        return name_of(compute, key), tensor.nbytes, str(tensor.dtype), in_symmetric_memory(tensor, self.group)

    def decide(self, which: tuple, how: str) -> Decision:
        name, num_bytes, dtype, _ = which
        return record(Decision(name, num_bytes, dtype, self.group.size(), how))

    def run(self, compute: Callable[[], R], tensor: torch.Tensor, key: Hashable) -> R:
        """The user's call: what `compute` returned, `tensor` being summed. Collective."""
        if not tensor.numel():
            return compute()
        which = self.identify(compute, tensor, key)
        trial = self.trials.get(which)
        chosen = trial.decision.chosen if trial else None
        if capturing(self.device):
            chosen = (trial.decision.captured if trial else None) or chosen or self.foretell(which)
        if chosen is None:
            if trial is None:
                trial = self.trials[which] = Trial(self.decide(which, "calls"), self.device.type)
            plan = self.advance(trial, tensor, which[-1])
            chosen = trial.decision.chosen
        issue = functools.partial(execute.issue_of, tensor=tensor, group=self.group)
        if chosen is not None:
            return execute.run_plan(chosen, compute, issue(chosen), tensor)
        return trial.run(plan, compute, issue(plan), tensor)

    def advance(self, trial: Trial, tensor: torch.Tensor, in_place: bool) -> Plan | None:
        """The plan of the coming call, None once one is chosen. Collective where candidates are named or compared."""
        trial.collect()
        decision = trial.decision
        if not trial.candidates and trial.num_calls == FIRST_CALLS:
            # The first call warms up (but counts if the others failed). The least of the others: what a busy host adds
            # is not the computation's.
            counted = trial.t_comp_us[1:] or trial.t_comp_us
            decision.t_comp_us = max(gather(min(counted, default=math.inf), self.group))
            trial.candidates = self.candidates(decision, tensor, in_place)
            trial.times_us = {plan: [] for plan in trial.candidates}
        plan = trial.next_plan()
        if plan is None:
            every_rank = gather(list(trial.medians_us().values()), self.group)
            self.settle(decision, dict(zip(trial.candidates, map(max, zip(*every_rank, strict=True)), strict=True)))
        return plan

    def candidates(self, decision: Decision, tensor: torch.Tensor, in_place: bool) -> list[Plan]:
        """What the model would try, without what cannot sum such a tensor. Collective; RuntimeError if the default
        cannot."""
        self.calibration = self.calibration or calibrate(self.device, self.group)
        predicted = self.calibration.predictions(decision.num_bytes, decision.t_comp_us, in_place)
        # The first sum over a backend makes its buffers and kernels, which is not the user's call's to wait for.
        scratch = torch.zeros_like(tensor)
        while True:
            plans = shortlist(predicted, self.device.type)
            errors = {plan.backend: first_error(refusal(plan, scratch, self.group), self.group) for plan in plans}
            refused = {backend for backend, error in errors.items() if error}
            if not refused:
                break
            if (default := sequential(self.device.type).backend) in refused:
                raise RuntimeError(f"{default}, the default all-reduce, fails: {errors[default]}")
            predicted = {plan: us for plan, us in predicted.items() if plan.backend not in refused}
        decision.predicted_us = predicted
        return plans

    def settle(self, decision: Decision, measured_us: dict[Plan, float]) -> Plan:
        decision.measured_us = measured_us
        decision.chosen = choose(measured_us, self.device.type)
        return decision.chosen

    def foretell(self, which: tuple) -> Plan:
        """The plan where nothing may be measured: by the model, if a computation of that name is known.

        The time of a computation known at another size is taken to grow with the tensor's bytes.
        """
        name, num_bytes, dtype, in_place = which
        known = [
            trial
            for (its_name, _, its_dtype, _), trial in self.trials.items()
            if (its_name, its_dtype) == (name, dtype) and trial.candidates
        ]
        foretold = self.foretold.get(which)
        if foretold and (foretold.predicted_us or not known):
            return foretold.chosen
        decision = self.foretold[which] = self.decide(which, "predicted")
        decision.chosen = sequential(self.device.type)
        if known:
            nearest = min((trial.decision for trial in known), key=lambda it: abs(math.log(it.num_bytes / num_bytes)))
            decision.t_comp_us = nearest.t_comp_us * num_bytes / nearest.num_bytes
            # A graph cannot make buffers: only backends whose workspace has held as much, and no new symmetric tensor.
            ready = {decision.chosen.backend}
            if not in_place:
                ready |= {p.backend for it in known if it.decision.num_bytes >= num_bytes for p in it.candidates}
            predicted = self.calibration.predictions(num_bytes, decision.t_comp_us, in_place)
            decision.predicted_us = {plan: us for plan, us in predicted.items() if plan.backend in ready}
            decision.chosen = choose(decision.predicted_us, self.device.type)
        return decision.chosen

    def tune(self, compute: Callable[[], object], tensor: torch.Tensor, key: Hashable, budget_s: float) -> Decision:
        """`tune`, for tensors and groups that are valid."""
        which = self.identify(compute, tensor, key)
        decision = self.decide(which, "tune")
        request = {"group": self.group, "device": self.device}
        before = tensor.clone()
        alone = interleave([Arm("compute", compute)], budget_s=budget_s / 10, **request)
        decision.t_comp_us = median_us(alone["compute"])
        plans = self.candidates(decision, tensor, which[-1])
        for_graphs = captured(plans)
        plans += for_graphs
        arms = []
        for plan in plans:
            issue = execute.planned_all_reduce(plan, tensor, self.group)
            run = functools.partial(execute.run_plan, plan, compute, issue, tensor)
            arms.append(Arm(str(plan), run, lambda: refill(tensor, before)))
        timings = interleave(arms, budget_s=budget_s, min_iterations=10, **request)
        refill(tensor, before)
        trial = self.trials[which] = Trial(decision, self.device.type)
        trial.candidates = plans
        measured_us = {plan: median_us(timings[str(plan)]) for plan in plans}
        decision.captured = self.settle(decision, measured_us)
        in_eager_code = {plan: us for plan, us in measured_us.items() if plan not in for_graphs}
        decision.chosen = choose(in_eager_code, self.device.type)
        return decision


def refill(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Also of a tensor that was made in inference mode, which nothing may write to outside."""
    with torch.inference_mode(tensor.is_inference()):
        tensor.copy_(values)


def refusal(plan: Plan, scratch: torch.Tensor, group: dist.ProcessGroup) -> str:
    """Why the plan's backend does not sum such a tensor, or "", it then being ready for the next. Collective."""
    try:
        work = execute.planned_all_reduce(plan, scratch, group)(False)
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

    Runs `compute` some hundred times, for about `budget_s` seconds beyond warm-up, so it must bear repetition; `tensor`
    is as before when this returns. Measures as `timing.interleave` does: on GPUs replays of a CUDA graph, without the
    host, which is what captured code will see. Returns the plan of captured code; eager code follows the best of those
    that are for it too, `decisions()[-1].chosen`. A group of one, or a tensor without elements, gets the sequential
    plan. Raises ValueError as `overlap` with `check`.
    """
    require = functools.partial(require_call, tensor, "all_reduce", group, "auto", 0, compute=compute)
    check_agreement(lambda: described(tensor, "all_reduce", require()[1], key), group)
    num_ranks, _ = require()
    if num_ranks == 1 or not tensor.numel():
        return sequential(tensor.device.type)
    return planner(group, tensor.device).tune(compute, tensor, key, budget_s).captured
