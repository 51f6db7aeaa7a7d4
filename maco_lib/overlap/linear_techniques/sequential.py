"""Multiply, then sum, in the current stream: cuBLAS and any all-reduce of `comm`.

Nothing is hidden, and nothing lost: no launch, wait or partial wave of tiles beyond those of the two by themselves.
What every other technique has to beat; wins at small M, where the all-reduce takes a few µs.
"""

from maco_lib.overlap.linear_techniques.problem import EVERYTHING, Problem


def run(problem: Problem) -> None:
    """Fill `problem.result`. Collective."""
    (block,) = problem.blocks([EVERYTHING])
    problem.multiply(block)
    problem.sum(block)
    problem.finish(block)
