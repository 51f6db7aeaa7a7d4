"""What `overlap(plan="auto")` settles on, beside every plan there is: pairs of sizes drawn from a seed, measured whole.

    torchrun --nproc-per-node 2 -m study.sections.overlap.measure_auto_pairs --out overlap_auto_pairs.json

Bytes of the all-reduce and n of the matmul are drawn evenly in their logarithms. The planner has the calls that it asks
for. Then every plan is issued eagerly a few times, behind a backlog; the fastest of them, the planner's choice and the
planner's own call are timed again: one by one, each behind the kernel that fills the tensor, as in somebody's code; and
back to back (`timing.interleave`).
"""

import argparse
import functools
import itertools
import json
import math
import os
import pathlib
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from maco_lib import comm
from maco_lib.comm import symmetric
from maco_lib.overlap import decisions, overlap, sm_limit
from maco_lib.overlap.plan import Decision, Plan
from maco_lib.overlap.planner import elapsed_us, mark
from maco_lib.overlap.search import most_calls
from maco_lib.overlap.trust import fault
from maco_lib.timing import SLEEP_CYCLES_PER_US, Arm, Barrier, gather, interleave, median_us, synchronize
from study.harness import worker

SEED, NUM_PAIRS = 25, 20
MIN_BYTES, MAX_BYTES, MIN_N, MAX_N = 2**16, 2**28, 512, 8192
# Beside the drawn ones: 403 µs by "auto" where a plan that leaves 12 SMs took 378 on 2 H200s.
KNOWN = (100 * 2**20, 5120)
DTYPE = torch.bfloat16
# Which stream, of which priority, and who is first.
ORDERS = (
    {"urgent": True}, {"urgent": False}, {"urgent": True, "compute_first": True},
    {"urgent": False, "compute_first": True}, {"urgent": False, "leads": True},
)  # fmt: skip
LEAVES = (0, 4, 8, 12, 16, 24)
SETTLING = most_calls(len(comm.BACKENDS), True) + 1
# Of the budget: the first look at all plans, and the second at the fastest. Runs of a plan in the first look; plans
# that are issued behind one backlog, and how long that is for each run, which no host takes.
FIRST_PART, SECOND_PART = 0.4, 0.25
MOST_RUNS, TOGETHER, ISSUE_US = 3, 8, 500
FINALISTS, FINAL_RUNS = 5, 40
TIMEOUT_S = 300.0


def pairs(seed: int, number: int, max_bytes: int = MAX_BYTES, max_n: int = MAX_N) -> list[tuple[int, int]]:
    """(bytes, n), multiples of 16 and 8; and the known pair where it is within the bounds."""
    draw, found = random.Random(seed), []
    for _ in range(number):
        num_bytes = even(draw, min(MIN_BYTES, max_bytes // 16), max_bytes)
        found.append((round(num_bytes / 16) * 16, round(even(draw, min(MIN_N, max_n // 4), max_n) / 8) * 8))
    return [KNOWN] * (KNOWN[0] <= max_bytes and KNOWN[1] <= max_n) + found


def even(draw: random.Random, least: float, most: float) -> float:
    """Evenly in the logarithm."""
    return math.exp(draw.uniform(math.log(least), math.log(most)))


def every_plan(kind: str, backends: Sequence[str], leaves: Sequence[int]) -> list[Plan]:
    """All that differ on such a device: each backend before the computation, and beside it in every order, leaving so
    many SMs."""
    plans = [Plan(backend, overlapped=False).on(kind) for backend in backends]
    for backend, left, order in itertools.product(backends, leaves, ORDERS):
        plans.append(Plan(backend, leaves=left, **order).on(kind))
    return list(dict.fromkeys(plans))


class Pair:
    """A matmul and an all-reduce. memory: uint8, at least `num_bytes`, where the user's tensor is."""

    def __init__(self, num_bytes: int, n: int, memory: torch.Tensor, group: dist.ProcessGroup):
        self.num_bytes, self.n, self.group, self.device = num_bytes, n, group, memory.device
        self.key = f"{num_bytes} bytes, n = {n}"
        self.a, self.b = (torch.randn(n, n, device=self.device).to(DTYPE) for _ in range(2))
        self.product = torch.empty_like(self.a)
        self.tensor = memory[:num_bytes].view(DTYPE)
        self.source = torch.randn(self.tensor.numel(), device=self.device).to(DTYPE)
        self.barrier = Barrier(group, self.device)

    def compute(self) -> torch.Tensor:
        return torch.mm(self.a, self.b, out=self.product)

    def refill(self) -> None:
        self.tensor.copy_(self.source)

    def run(self, plan: Plan) -> None:
        overlap(self.compute, self.tensor, group=self.group, plan=plan)

    def run_auto(self) -> None:
        overlap(self.compute, self.tensor, group=self.group, plan="auto", key=self.key)

    def settle(self) -> Decision:
        """The planner's decision after the calls that it takes; RuntimeError where there is none by then."""
        for _ in range(SETTLING):
            self.refill()
            self.run_auto()
        synchronize(self.device)
        decision = next(each for each in reversed(decisions()) if each.key == self.key)
        if decision.chosen is None:
            raise RuntimeError(f'{self.key}: plan="auto" did not settle in {SETTLING} calls')
        return decision

    def one_by_one(self, runs: Mapping[str, Callable[[], None]], num_rounds: int) -> dict[str, list[float]]:
        """Times of each in µs on the slowest rank, in random order, each behind a kernel that fills the tensor anew."""
        order = random.Random(len(runs))  # alike on every rank
        asked = [name for _ in range(num_rounds) for name in order.sample(list(runs), len(runs))]
        times: dict[str, list[float]] = {name: [] for name in runs}
        for first in range(0, len(asked), TOGETHER):
            marks = []
            if self.device.type == "cuda":
                torch.cuda._sleep(TOGETHER * ISSUE_US * SLEEP_CYCLES_PER_US)
            for name in asked[first : first + TOGETHER]:
                self.refill()
                self.barrier()
                begun = mark(self.device)
                runs[name]()
                marks.append((name, begun, mark(self.device)))
            synchronize(self.device)
            for name, begun, ended in marks:
                times[name].append(elapsed_us(begun, ended))
        every_rank = gather(list(times.values()), self.group)
        slowest = [list(map(max, zip(*samples, strict=True))) for samples in zip(*every_rank, strict=True)]
        return dict(zip(times, slowest, strict=True))

    def look(self, plans: Sequence[Plan], budget_s: float) -> dict[Plan, float]:
        """The least of a few times of each plan; the first runs make what they need."""
        begin = time.perf_counter()
        for plan in plans:
            self.refill()
            self.run(plan)
        synchronize(self.device)
        mean_us = max(gather((time.perf_counter() - begin) * 1e6 / len(plans), self.group))
        num_runs = max(1, min(MOST_RUNS, int(budget_s * 1e6 / (len(plans) * max(mean_us, ISSUE_US)))))
        times = self.one_by_one({str(plan): functools.partial(self.run, plan) for plan in plans}, num_runs)
        return {plan: min(times[str(plan)]) for plan in plans}

    def compare(self, plans: Sequence[Plan], budget_s: float) -> tuple[dict[str, float], dict[str, float]]:
        """Medians in µs of the planner's own call, "auto", and of the plans: one by one, and back to back, where each
        call begins as the one before has joined its streams."""
        runs = {"auto": self.run_auto, **{str(plan): functools.partial(self.run, plan) for plan in plans}}
        fresh = {name: statistics.median(times) for name, times in self.one_by_one(runs, FINAL_RUNS).items()}
        timings = interleave(
            [Arm(name, run, self.refill) for name, run in runs.items()],
            group=self.group, device=self.device, budget_s=budget_s, min_iterations=10, captured=False,
        )  # fmt: skip
        return fresh, {name: median_us(timing) for name, timing in timings.items()}


def measured(pair: Pair, backends: Sequence[str], leaves: Sequence[int], budget_s: float) -> dict:
    """Times in µs of the planner's own call and of the best plan, and their ratio. Collective.

    plan_ratio: the same where the plan that it chose is given to `overlap` as the others are.
    """
    begin, kind = time.perf_counter(), pair.device.type
    decision = pair.settle()
    faults = {name: fault(name, pair.device, pair.group, pair.num_bytes) for name in backends}
    plans = every_plan(kind, [name for name in backends if not faults[name]], leaves)
    random.Random(len(plans)).shuffle(plans)  # alike on every rank
    looked = pair.look(plans, FIRST_PART * budget_s)
    finalists = sorted(looked, key=lambda plan: (looked[plan], str(plan)))[:FINALISTS]
    finalists += [decision.chosen] * (decision.chosen not in finalists)
    fresh, back_to_back = pair.compare(finalists, SECOND_PART * budget_s)
    chosen, auto_us, back_us = str(decision.chosen), fresh.pop("auto"), back_to_back.pop("auto")
    best = min(fresh, key=fresh.get)
    return {
        "comm_bytes": pair.num_bytes, "matmul_n": pair.n, "num_ranks": pair.group.size(), "num_plans": len(plans),
        "auto_us": auto_us, "chosen": chosen, "best_us": fresh[best], "best": best, "ratio": auto_us / fresh[best],
        "plan_ratio": fresh[chosen] / fresh[best], "back_to_back_ratio": back_us / min(back_to_back.values()),
        "finalists_us": fresh, "back_to_back_us": back_to_back,
        "first_look_us": {str(plan): looked[plan] for plan in plans},
        "tried_us": {str(plan): us for plan, us in decision.measured_us.items()},
        "faults": {name: why for name, why in faults.items() if why},
        "seconds": time.perf_counter() - begin,
    }  # fmt: skip


def summary(rows: Sequence[dict]) -> dict:
    """Of the ratios of the planner's time to the best plan's."""
    worst = max(rows, key=lambda row: row["ratio"])
    return {
        "num_pairs": len(rows),
        "median_ratio": statistics.median(row["ratio"] for row in rows),
        "worst_ratio": worst["ratio"],
        "median_back_to_back_ratio": statistics.median(row["back_to_back_ratio"] for row in rows),
        "worst_back_to_back_ratio": max(row["back_to_back_ratio"] for row in rows),
        "median_plan_ratio": statistics.median(row["plan_ratio"] for row in rows),
        "worst_plan_ratio": max(row["plan_ratio"] for row in rows),
        "worst": {name: worst[name] for name in ("comm_bytes", "matmul_n", "chosen", "best")},
    }


def users_memory(num_bytes: int, device: torch.device, group: dist.ProcessGroup, ordinary: bool) -> torch.Tensor:
    """uint8, in symmetric memory where the machine has it: there a user who cares puts the tensor."""
    if ordinary or device.type != "cuda" or symmetric.unreachable(device, group):
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return comm.symmetric_empty((num_bytes,), torch.uint8, device, group)


def run(options: argparse.Namespace, device: torch.device, group: dist.ProcessGroup) -> dict:
    """All pairs; rank 0 writes what is done so far after each. Collective."""
    chosen = pairs(options.seed, options.num_pairs, options.max_bytes, options.max_n)
    everywhere = set.intersection(*map(set, gather(comm.available("all_reduce", device, group), group)))
    backends = [name for name in comm.BACKENDS if name in everywhere]
    leaves = [left for left in LEAVES if device.type == "cuda" and not sm_limit.unavailable(left, device)] or [0]
    memory = users_memory(max(num_bytes for num_bytes, _ in chosen), device, group, options.ordinary)
    rows, found = [], {}
    for num_bytes, n in chosen:
        row = measured(Pair(num_bytes, n, memory, group), backends, leaves, options.budget_s)
        rows.append(row)
        found = {"seed": options.seed, "summary": summary(rows), "rows": rows}
        if group.rank() == 0:
            took = f"auto {row['auto_us']:.1f} µs ({row['chosen']}), best {row['best_us']:.1f} µs ({row['best']})"
            print(
                f"{num_bytes} bytes, n = {n}: {took}, {row['ratio']:.3f}, {row['seconds']:.1f} s",
                flush=True,
            )
            print(f"    back to back {row['back_to_back_ratio']:.3f}", flush=True)
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if group.rank() == 0:
        told = found["summary"]
        print(f"median {told['median_ratio']:.3f}, worst {told['worst_ratio']:.3f}; back to back "
              f"{told['median_back_to_back_ratio']:.3f}, {told['worst_back_to_back_ratio']:.3f}")  # fmt: skip
    return found


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON of all pairs, written after each")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--num-pairs", type=int, default=NUM_PAIRS, help="drawn ones, beside the known one")
    parser.add_argument("--budget-s", type=float, default=4.0, help="seconds of a pair, about")
    parser.add_argument("--max-bytes", type=int, default=MAX_BYTES, help="of an all-reduce")
    parser.add_argument("--max-n", type=int, default=MAX_N, help="of a matmul")
    parser.add_argument("--ordinary", action="store_true", help="tensors in ordinary memory, not in symmetric memory")
    return parser.parse_args(arguments)


def main() -> None:
    options = parsed()
    num_ranks, kind = int(os.environ["WORLD_SIZE"]), "cuda" if torch.cuda.is_available() else "cpu"
    with worker.joined(num_ranks, kind, TIMEOUT_S) as (device, group), torch.no_grad():
        run(options, device, group)
    if kind == "cpu":
        worker.leave()


if __name__ == "__main__":
    main()
