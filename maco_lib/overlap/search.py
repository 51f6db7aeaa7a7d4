"""Which plans `plan="auto"` times, stage by stage, and how often: each stage follows from the times of those before.

On 2 H200s, 21 pairs of sizes, 465 plans each (docs/tried.md): the two fastest backends are the same in every order of
issue and with most numbers of SMs reserved, so every backend is looked at in two ways, and the fastest two in all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from maco_lib.overlap.plan import Plan, sequential

# Which stream has the collective, and what is issued first.
ORDERS = ({"leads": True}, {}, {"compute_first": True})
# SMs that the computation's matmuls leave alone; of the first look, so many.
RESERVED, RESERVED_FIRST = (0, 4, 12, 24), 12
NUM_BACKENDS, NUM_FINALISTS, FINAL_ROUNDS = 2, 6, 8


@dataclass(frozen=True)
class Stage:
    """`plans`, each run once in every one of `num_rounds` rounds; the first round warms up and does not count."""

    plans: tuple[Plan, ...]
    num_rounds: int


def beside(kind: str, backend: str, order: Mapping[str, bool], reserved: int) -> Plan:
    return Plan(backend, urgent=False, leaves=reserved, **order).on(kind)


def first_look(kind: str, backends: Sequence[str], reserves: bool) -> Stage:
    """The default, sequential, and every backend side by side with the computation in two orders."""
    reserved = RESERVED_FIRST if reserves else 0
    plans = [beside(kind, backend, order, reserved) for backend in backends for order in ORDERS[:2]]
    return Stage(tuple(dict.fromkeys([sequential(kind), *plans])), 3)


def closer_look(kind: str, times_us: Mapping[Plan, float], reserves: bool) -> Stage:
    """The fastest backends by the first look: one after the other, and side by side in every order."""
    by_time = sorted((plan for plan in times_us if plan.overlapped), key=lambda plan: (times_us[plan], str(plan)))
    fastest = list(dict.fromkeys(plan.backend for plan in by_time))[:NUM_BACKENDS]
    plans = [replace(sequential(kind), backend=backend) for backend in fastest]
    for backend in fastest:
        plans += [beside(kind, backend, order, sms) for order in ORDERS for sms in (RESERVED if reserves else (0,))]
    return Stage(tuple(plan for plan in dict.fromkeys(plans) if plan not in times_us), 3)


def final(kind: str, times_us: Mapping[Plan, float], budget_s: float = math.inf) -> Stage:
    """The fastest of all, and what they have to beat: the default and the fastest sequential plan.

    budget_s: of all rounds, about; where one takes that long there are 3.
    """
    by_time = sorted(times_us, key=lambda plan: (times_us[plan], str(plan)))
    rivals = [plan for plan in by_time if not plan.overlapped][:1]
    plans = tuple(dict.fromkeys([sequential(kind), *rivals, *by_time[:NUM_FINALISTS]]))
    round_s = sum(times_us[plan] for plan in plans) * 1e-6
    return Stage(plans, int(min(FINAL_ROUNDS, max(3, budget_s / round_s))))


def most_calls(num_backends: int, reserves: bool) -> int:
    """After at most so many calls the choice is settled."""
    in_all = 1 + len(ORDERS) * (len(RESERVED) if reserves else 1)  # plans of a backend
    first, closer = 1 + len(ORDERS[:2]) * num_backends, min(NUM_BACKENDS, num_backends) * in_all
    return 3 * (first + closer) + FINAL_ROUNDS * min(NUM_FINALISTS + 2, num_backends * in_all)
