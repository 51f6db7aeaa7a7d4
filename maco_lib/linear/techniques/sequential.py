"""Multiply, then sum, in the current stream: cuBLAS and any all-reduce of `comm`.

Nothing is hidden, and nothing lost: no launch, wait or partial wave of tiles beyond those of the two by themselves.
What every other technique has to beat; wins at small M, where the all-reduce takes a few µs.
"""

import math
from collections.abc import Callable

import torch

from maco_lib import comm
from maco_lib import state as states
from maco_lib.comm.mailbox import Mailbox
from maco_lib.comm.mailed import Mailed
from maco_lib.comm.nccl_symmetric import NcclSymmetric
from maco_lib.comm.symmetric import Memory, SymmetricAllReduce, whole
from maco_lib.comm.vllm_custom import VllmCustom
from maco_lib.linear.techniques.problem import EVERYTHING, Problem, Workspace, beside, flattened
from maco_lib.linear.techniques.technique import Technique

# (x, weight, bias, residual) -> result; x: (..., K), residual and result: (..., N).
Bound = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]


def run(problem: Problem) -> None:
    """Fill `problem.result`. Collective."""
    (block,) = problem.blocks([EVERYTHING])
    problem.multiply(block)
    problem.sum(block)
    problem.finish(block)


def bound(state: states.State, backend_name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Bound | None:
    """All of a call with such a result, everything that it needs made; None where `run` has to do it. Collective.

    Raises ValueError on a type or size that the backend has no kernel for.
    """
    made, key = state.get(Workspace).bound, (backend_name, shape, dtype)
    if key not in made:
        backend = comm.backend(backend_name)
        if isinstance(backend, NcclSymmetric):
            return None
        if isinstance(backend, SymmetricAllReduce):
            backend.require("all_reduce", dtype)
        if isinstance(backend, Mailed) and backend.anywhere(math.prod(shape) * dtype.itemsize):
            kernel, box = backend.kernel(), state.get(Mailbox).box
            made.keep(key, in_place(lambda product: kernel(product, box), state))
        elif isinstance(backend, SymmetricAllReduce):
            made.keep(key, in_workspace(backend, state, shape, dtype))
        else:
            made.keep(key, in_place(lambda product: backend.all_reduce(product, state.group), state))
    return made[key]


def in_place(sum_up: Callable[[torch.Tensor], object], state: states.State) -> Bound:
    """The product is summed where cuBLAS leaves it."""
    has_bias, turns = state.group.rank() == 0, state.turns

    def call(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        product = torch.nn.functional.linear(x, weight, bias if has_bias else None).contiguous()
        turns.take()
        sum_up(product)
        if residual is not None:
            product.add_(residual)
        turns.give()
        return product

    return call


def in_workspace(backend: SymmetricAllReduce, state: states.State, shape: tuple[int, ...], dtype: torch.dtype) -> Bound:
    """The matmul writes into the workspace; the sum, or what it leaves there, goes to the result."""
    size, num_bytes = (math.prod(shape[:-1]), shape[-1]), whole(math.prod(shape) * dtype.itemsize)
    if isinstance(backend, VllmCustom):
        backend.require_size(num_bytes)
    source = state.get(Workspace).of(num_bytes)[:num_bytes].view(dtype)
    product, region = source[: math.prod(shape)].view(size), state.get(Memory).find(source)
    has_bias, turns, group = state.group.rank() == 0, state.turns, state.reference

    def call(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        turns.take()
        if bias is not None and has_bias:
            torch.addmm(bias, flattened(x), weight.t(), out=product)
        else:
            torch.mm(flattened(x), weight.t(), out=product)
        result = None if backend.in_place else torch.empty_like(product)
        total = source if backend.in_place else beside(result, source)
        backend.reduce(region, source, total, group())
        total = product if backend.in_place else total[: product.numel()].view(size)
        if residual is not None:
            result = torch.add(total, flattened(residual), out=result)
        elif result is None:
            result = total.clone()
        elif total.data_ptr() != result.data_ptr():
            result.copy_(total)
        turns.give()
        return result if len(shape) == 2 else result.view(shape)

    return call


def candidates(kind: str, backends: list[str]) -> list[str]:
    return [f"sequential:{name}" for name in backends]


TECHNIQUE = Technique("sequential", lambda problem, plan: run(problem), candidates, place=0)
