"""Section 5: does a tile of the persistent kernel ever reach a peer as an earlier launch left it? Counted over many.

Launches follow each other in bursts, each on another input than those before and into another result than the next:
what an earlier one left, in a cache or a buffer, gives wrong bits. After a burst each result is compared, on the GPU,
with the first on its input, which was judged against float64. Beside them, copies on a stream of their own drive random
data through the L2 cache.
"""

import collections
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from maco_lib.kernels.tile_order import TileOrder
from maco_lib.linear.techniques import persistent
from maco_lib.linear.techniques.problem import Problem as Call
from maco_lib.timing import capture, decided, first_error, gather
from study.harness import worker
from study.harness.worker import Context, Result
from study.sections.linear_all_reduce.problem import Outputs, Problem

# A burst is a launch into each result. Two numbers without a common divisor: every result is of another input than the
# last time, also from round to round.
NUM_INPUTS, BURST = 3, 5
ROUND = NUM_INPUTS * BURST
# The ranks agree on whether to go on after so many rounds; the host is so many ahead of the GPU.
ROUNDS_TOGETHER, ROUNDS_AHEAD = 20, 2
# Copies that are issued at a time, and how often that is in flight.
COPIES, BATCHES = 24, 2
# Runs input `which` into the result that is given.
Launch = Callable[[int, torch.Tensor], object]


def one_round(
    launch: Launch, firsts: Sequence[torch.Tensor], results: Sequence[torch.Tensor], num_wrong: torch.Tensor
) -> None:
    """`ROUND` launches in bursts, and after each burst the comparisons; `num_wrong`, on the device, counts them.

    firsts: by input; results: `BURST` of them.
    """
    for begin in range(0, ROUND, BURST):
        burst = [(number % NUM_INPUTS, results[number % BURST]) for number in range(begin, begin + BURST)]
        for which, result in burst:
            launch(which, result)
        for which, result in burst:
            num_wrong += (result.view(torch.int64) != firsts[which].view(torch.int64)).any()


def handed_over(order: TileOrder) -> int:
    """Tiles that go from one rank to another in a launch, partials and sums, over all ranks."""
    return sum(len(fetches) for *_, fetches in map(order.tables, range(order.num_ranks)))


class Disturbance:
    """Copies of random data through the L2 cache, of half its size to three times that: by the SMs and by the copy
    engine, which goes on where a kernel takes all SMs."""

    def __init__(self, device: torch.device):
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        size = 3 * self.cache_bytes
        self.source, self.target = (torch.randint(256, (size,), dtype=torch.uint8, device=device) for _ in range(2))
        self.from_host = torch.randint(256, (self.cache_bytes // 16,), dtype=torch.uint8).pin_memory()
        self.stream, self.sizes = torch.cuda.Stream(device), random.Random(size)
        self.in_flight: collections.deque[torch.cuda.Event] = collections.deque()
        self.stream.wait_stream(torch.cuda.current_stream(device))

    def feed(self) -> None:
        """Issue what is missing of `BATCHES` batches; never waits."""
        while self.in_flight and self.in_flight[0].query():
            self.in_flight.popleft()
        with torch.cuda.stream(self.stream):
            while len(self.in_flight) < BATCHES:
                for number in range(COPIES):
                    part = slice(0, self.sizes.randrange(self.cache_bytes // 2, len(self.source)))
                    if number % 3 == 0:
                        torch.bitwise_not(self.source[part], out=self.target[part])
                    elif number % 3 == 1:
                        self.target[part].copy_(self.source[part])
                    else:
                        self.target[: len(self.from_host)].copy_(self.from_host, non_blocking=True)
                self.in_flight.append(self.stream.record_event())


def first_results(
    problem: Problem, inputs: Sequence[torch.Tensor], launch: Launch, result: torch.Tensor
) -> tuple[list[torch.Tensor], str]:
    """The judged result of each input, or none and what is wrong. Collective."""
    firsts = []
    for which, x in enumerate(inputs):

        def run(number: int, which: int = which) -> Outputs:
            launch(which, result)
            return (result,)

        problem.x = x
        problem.expect()
        error, _, equal = problem.judge(run)
        if error or not equal:
            return [], error or "the result differs between the ranks"
        firsts.append(result.clone())
    return firsts, ""


def run_on(
    step: Callable[[], object], tiles_of_round: int, point: dict[str, Any], problem: Problem
) -> tuple[int, float]:
    """(rounds, seconds) until the point's tiles are handed over or its time has passed. Collective."""
    disturbance, begin, num_rounds, seconds = Disturbance(problem.device), time.perf_counter(), 0, 0.0
    ahead: collections.deque[torch.cuda.Event] = collections.deque()
    while num_rounds * tiles_of_round < point["num_tiles"] and seconds < point["max_seconds"]:
        for _ in range(ROUNDS_TOGETHER):
            disturbance.feed()
            step()
            ahead.append(torch.cuda.current_stream().record_event())
            if len(ahead) > ROUNDS_AHEAD:
                ahead.popleft().synchronize()
        num_rounds += ROUNDS_TOGETHER
        torch.cuda.current_stream().synchronize()
        seconds = decided(time.perf_counter() - begin, problem.group)
        problem.context.step()
    torch.cuda.synchronize(problem.device)
    return num_rounds, seconds


def measure(point: dict[str, Any], context: Context) -> Result:
    """The persistent kernel with its own tiling, again and again, issued or replayed as the point says."""
    problem = Problem(point, context)
    weight, group = problem.weights[0], problem.group
    inputs = [problem.normal(*problem.x.shape) for _ in range(NUM_INPUTS)]
    results = [torch.full_like(problem.product, torch.nan) for _ in range(BURST)]

    def call(which: int, result: torch.Tensor) -> Call:
        return Call(inputs[which], weight, None, None, result, "", group)

    def launch(which: int, result: torch.Tensor) -> None:
        persistent.run(call(which, result), strict=point["strict"])

    num_wrong = torch.zeros((), dtype=torch.int64, device=problem.device)
    facts = {"num_launches_done": 0, "num_tiles": 0, "num_wrong": 0, "seconds": 0.0}
    firsts, why = first_results(problem, inputs, launch, results[0])

    def step() -> None:
        one_round(launch, firsts, results, num_wrong)

    graph = None
    if not why and point["launch"] == "replayed":
        graph, why = capture(step, 1)
        why = first_error(why, group)
    if not why:
        parts = persistent.divide(call(0, results[0]), None)
        tiles_of_round = ROUND * sum(handed_over(order) for _, _, order, *_ in parts)
        num_rounds, facts["seconds"] = run_on(graph.replay if graph else step, tiles_of_round, point, problem)
        facts["num_launches_done"], facts["num_tiles"] = num_rounds * ROUND, num_rounds * tiles_of_round
        facts["num_wrong"] = sum(gather(int(num_wrong), group))
        if facts["num_wrong"]:
            why = f"{facts['num_wrong']} of {facts['num_launches_done']} launches left wrong bits"
    if graph:
        graph.reset()
    return Result([{
        **{column: point[column] for column in ("layer", "m", "n", "k", "dtype", "launch", "strict")},
        "tp": context.num_ranks, "asked_tiles": point["num_tiles"], **facts, "correct": not why, "error": why,
    }])  # fmt: skip


if __name__ == "__main__":
    worker.main(measure)
