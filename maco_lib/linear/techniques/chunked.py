"""Cut the matmul along M; while a chunk is summed on a side stream (by gloo's thread on a CPU), multiply the next.

Hides at most (C - 1) / C of the all-reduce with C chunks, and pays for it three times: smaller matmuls fill the GPU
worse (wave quantisation), smaller all-reduces use the links worse, and the all-reduce takes SMs from the matmul. Wins
where both are long and the backend needs few SMs; over NCCL it lost wherever we measured.
"""

import torch

from maco_lib.linear.techniques import sequential
from maco_lib.linear.techniques.problem import EVERYTHING, Block, Problem
from maco_lib.linear.techniques.technique import Argument, Technique
from maco_lib.overlap.execute import highest_priority, side_stream

# Chunks are of whole tiles of the matmul, but for the last: a tile that a cut goes through would be computed twice.
TILE = 128
# What it is tried with: backends that leave the matmul its SMs, and numbers of chunks.
LIGHT_BACKENDS = ("maco_staged_8", "maco_push_64", "gloo")
NUM_CHUNKS = (2, 4, 8)


def cut(length: int, num_chunks: int) -> list[slice]:
    """`length` in at most `num_chunks` pieces of whole tiles, the last one shorter; fewer where the tiles are fewer."""
    num_tiles = -(-length // TILE)
    step = -(-num_tiles // num_chunks) * TILE
    return [slice(begin, min(begin + step, length)) for begin in range(0, length, step)]


def run(problem: Problem, num_chunks: int) -> None:
    """Fill `problem.result`. Collective. One chunk, where M is at most a tile, is run as `sequential`."""
    pieces = [(rows, EVERYTHING[1]) for rows in cut(len(problem.result), num_chunks)]
    if len(pieces) == 1:
        sequential.run(problem)
    elif problem.result.device.type == "cuda":
        on_side_stream(problem, problem.blocks(pieces))
    else:
        on_a_thread(problem, problem.blocks(pieces))


def on_side_stream(problem: Problem, blocks: list[Block]) -> None:
    """Of the highest priority: its CTAs take the SMs that the matmul frees first."""
    device = problem.result.device
    current, side = torch.cuda.current_stream(device), side_stream(device, highest_priority())
    try:
        for block in blocks:
            problem.multiply(block)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                problem.sum(block)
                problem.finish(block)
    finally:
        # Joined even after an error: the memory of the blocks goes back to the current stream.
        current.wait_stream(side)


def on_a_thread(problem: Problem, blocks: list[Block]) -> None:
    works = []
    for block in blocks:
        problem.multiply(block)
        works.append(problem.sum(block, async_op=True))
    for block, work in zip(blocks, works, strict=True):
        if work is not None:
            work.wait()
        problem.finish(block)


def candidates(kind: str, backends: list[str]) -> list[str]:
    return [f"chunked:{num}:{name}" for name in backends if name in LIGHT_BACKENDS for num in NUM_CHUNKS]


TECHNIQUE = Technique(
    "chunked",
    lambda problem, plan: run(problem, plan.num_chunks),
    candidates,
    Argument("num_chunks", "NUMBER", lambda num: isinstance(num, int) and num > 1, "an int of 2 or more", read=int),
    covers=lambda plan, num_rows: len(cut(num_rows, plan.num_chunks)) == plan.num_chunks,
    place=1,
)
