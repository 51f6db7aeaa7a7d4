"""One matmul and all-reduce to be run, and the blocks it is run in: where each product lies until it is summed.

The matmul writes where the backend sums without a copy: into a workspace in symmetric or registered memory, or, for
NCCL and gloo, into the result itself. What leaves the workspace goes straight to the result, the residual added on the
way. So a call's result is memory of its own, which no later call touches; the workspace is the next call's again once
the stream comes to it.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from maco_lib import comm
from maco_lib import state as states
from maco_lib.comm import nccl_symmetric, symmetric
from maco_lib.comm.nccl_symmetric import NcclSymmetric
from maco_lib.comm.symmetric import GRANULE_BYTES, MIN_WORKSPACE, SymmetricAllReduce, symmetric_empty, whole
from maco_lib.comm.vllm_custom import VllmCustom
from maco_lib.kernels.launch import Launches
from maco_lib.state import State
from maco_lib.turns import NoTurns, Turns

Piece = tuple[slice, slice]
EVERYTHING: Piece = (slice(None), slice(None))


@dataclass(frozen=True)
class Block:
    """A rectangle of the result, `piece`. product: (m, n), contiguous, what this rank multiplies; source: flat, the
    product and less than a granule more, what the backend sums; total: flat, where the sum is (often `source`);
    in_result: whether that is the result's own memory."""

    piece: Piece
    product: torch.Tensor
    source: torch.Tensor
    total: torch.Tensor
    in_result: bool


def taken(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """`tensor[piece]`; itself, and no view of it, where that is everything: small problems feel each."""
    return tensor if piece is EVERYTHING else tensor[piece]


@dataclass(eq=False)
class Problem:
    """result (M, N) = sum over the ranks of x (M, K) @ weight (N, K).T, + bias (N,) once, + residual (M, N) once.

    result: contiguous, uninitialised. K may differ between the ranks. More than one rank; M and N at least 1. The bias
    is added within the first rank's matmul, in its accumulator; the residual after the sum, on every rank.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    result: torch.Tensor
    backend_name: str
    group: dist.ProcessGroup

    @property
    def turns(self) -> Turns | NoTurns:
        """Those of the device: `sum`, and `blocks` where they are in the workspace, take one; `finish` gives it."""
        return states.on(self.result.device).turns

    def blocks(self, pieces: list[Piece]) -> list[Block]:
        """A block for each piece, none sharing memory with another. Collective when the workspace has to grow.

        Raises ValueError on a type or size that the backend has no kernel for.
        """
        backend, dtype = comm.backend(self.backend_name), self.result.dtype
        in_workspace = isinstance(backend, (SymmetricAllReduce, NcclSymmetric))
        targets = [taken(self.result, piece) for piece in pieces]
        if isinstance(backend, SymmetricAllReduce) and all(backend.anywhere(target.nbytes) for target in targets):
            backend.require("all_reduce", dtype)
            in_workspace = False
        if not in_workspace and all(target.is_contiguous() for target in targets):
            flats = [target.view(-1) for target in targets]
            return [Block(*each, in_result=True) for each in zip(pieces, targets, flats, flats, strict=True)]
        lengths = [whole(target.numel() * dtype.itemsize) // dtype.itemsize for target in targets]
        if in_workspace:
            backend.require("all_reduce", dtype)
            if isinstance(backend, VllmCustom):
                backend.require_size(max(lengths) * dtype.itemsize)
            storage = self.workspace(backend, sum(lengths))
        else:
            storage = self.result.new_empty(sum(lengths))
        made = []
        for piece, target, source in zip(pieces, targets, storage.split(lengths), strict=True):
            product = source[: target.numel()].view(target.shape)
            total = source if getattr(backend, "in_place", True) else beside(target, source)
            made.append(Block(piece, product, source, total, total.data_ptr() == target.data_ptr()))
        return made

    def workspace(self, backend: SymmetricAllReduce | NcclSymmetric, numel: int) -> torch.Tensor:
        """Flat memory that the backend sums without a copy, free for what the current stream does next."""
        device, dtype = self.result.device, self.result.dtype
        # The matmul that comes writes to it.
        self.turns.take()
        if isinstance(backend, NcclSymmetric):
            return nccl_symmetric.memory(self.group, device, backend.num_ctas).staging(numel, dtype)
        storage = states.of(self.group, device).get(Workspace).of(numel * dtype.itemsize)
        return storage[: numel * dtype.itemsize].view(dtype)

    def multiply(self, block: Block) -> None:
        """This rank's product, on the current stream."""
        rows, columns = block.piece
        x, weight = (self.x, self.weight) if block.piece is EVERYTHING else (self.x[rows], self.weight[columns])
        if self.bias is not None and self.group.rank() == 0:
            torch.addmm(self.bias[columns], x, weight.t(), out=block.product)
        else:
            torch.mm(x, weight.t(), out=block.product)

    def sum(self, block: Block, async_op: bool = False) -> dist.Work | None:
        """Sum the block over the ranks, on the current stream; async_op: as `comm.all_reduce`. Collective."""
        backend = comm.backend(self.backend_name)
        self.turns.take()
        if not isinstance(backend, SymmetricAllReduce) or block.in_result and block.total is block.source:
            return backend.all_reduce(block.source, self.group, async_op)
        region = symmetric.memory(self.group, block.source.device).find(block.source)
        backend.reduce(region, block.source, block.total, self.group)
        return None

    def finish(self, block: Block) -> None:
        """Bring the sum to the result, with the residual, on the current stream."""
        if not block.in_result or self.residual is not None:
            target = taken(self.result, block.piece)
            total = block.total[: target.numel()].view(target.shape)
            if self.residual is not None:
                torch.add(total, taken(self.residual, block.piece), out=target)
            else:
                target.copy_(total)
        self.turns.give()


def beside(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Where a sum of `source` goes that cannot be done in place: `target` itself if its memory is of that shape."""
    fits = target.is_contiguous() and target.nbytes == source.nbytes and target.data_ptr() % GRANULE_BYTES == 0
    return target.view(-1) if fits else torch.empty_like(source)


class Workspace:
    """The symmetric memory that matmuls write to. It grows; the smaller ones are kept for the graphs that use them."""

    def __init__(self, state: State):
        self.state = state
        self.memory: torch.Tensor | None = None
        self.bound = Launches()  # calls of `sequential`, by backend, shape and type

    def of(self, num_bytes: int) -> torch.Tensor:
        """At least `num_bytes` (uint8), made anew, twice as large or more, when they do not suffice.

        Collective when it grows. Raises RuntimeError where that would be while a graph is captured.
        """
        if self.memory is None or self.memory.nbytes < num_bytes:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"cannot make a workspace of {num_bytes} bytes while a graph is captured: call before"
                )
            size = max(MIN_WORKSPACE, 1 << (num_bytes - 1).bit_length())
            self.memory = symmetric_empty((size,), torch.uint8, self.state.device, self.state.group)
            self.bound.clear()
            self.state.calls.clear()  # a backend may have to be told of it before a capture
        return self.memory


def workspace_address(device: torch.device, group: dist.ProcessGroup) -> int:
    """Where the workspace is, 0 where there is none: another one when it has grown."""
    made = states.of(group, device).known(Workspace)
    return 0 if made is None or made.memory is None else made.memory.data_ptr()


def flattened(tensor: torch.Tensor) -> torch.Tensor:
    """(..., n) as (m, n); a vector is one row."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
