"""Few rows: a matmul that takes as long as reading its weight, and sends its product as soon as it is there.

`kernels.decode` puts the product into the inboxes of all ranks; `kernels.one_shot.take_sum`, there before the matmul
has ended, adds up what arrives. No launch, and no way through memory, between the two: what is left of the all-reduce
is one way over the link. On Hopper GPUs, up to `MAX_ROWS`. Above 2 ranks the bytes count: it moves 2 (P - 1) S.
"""

import torch

from maco_lib import state as states
from maco_lib.comm.mailbox import Mailbox
from maco_lib.kernels.decode_tiles import MAX_ROWS
from maco_lib.linear.techniques.persistent import LINES, MULTIPLE, for_tma, suits
from maco_lib.linear.techniques.problem import Problem
from maco_lib.linear.techniques.technique import Technique
from maco_lib.overlap import validation


def unsuited(num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device, num_ranks: int) -> str:
    """Why the kernels are not for a result (num_rows, num_columns), or ""; the same on every rank."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return f"it is for Hopper GPUs, x is on {device}"
    from maco_lib.kernels.decode import DTYPES, fits

    if dtype not in DTYPES:
        return f"it is for {' and '.join(map(str, DTYPES))}, x is of {dtype}"
    if not fits(num_rows, num_columns, num_ranks):
        limits = f"up to {MAX_ROWS} rows, N a multiple of 4, and room for every rank's product"
        return f"a result of ({num_rows}, {num_columns}) is not for it: {limits}"
    return ""


def unavailable(problem: Problem) -> str:
    """Why the kernels cannot run this problem, or ""; the same on every rank."""
    result, group = problem.result, problem.group
    why = unsuited(*result.shape, result.dtype, result.device, group.size())
    return why or validation.unavailable(LINES, result.device, group)


def in_whole_lines(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as TMA can read it: a copy where it is laid out otherwise, with columns of zeros up to 16 bytes, also
    where it has none (of a rank with K = 0)."""
    tensor, num_columns = for_tma(tensor), tensor.shape[1]
    if num_columns and tensor.stride(0) % MULTIPLE == 0:
        return tensor
    return torch.nn.functional.pad(tensor, (0, -num_columns % MULTIPLE if num_columns else MULTIPLE))


def run(problem: Problem) -> None:
    """Fill `problem.result`. Collective.

    Copies x or weight where they are not laid out for TMA. Raises ValueError on a problem that the kernels cannot run.
    """
    state, result = states.of(problem.group, problem.result.device), problem.result
    made, suits = state.known(Mailbox), ("decode suits", result.shape, result.dtype)
    if made is None or suits not in made.box.launches:
        if why := unavailable(problem):
            raise ValueError(f"technique 'decode': {why}")
        made = state.get(Mailbox)
        made.box.launches.keep(suits, True)
    from maco_lib.kernels.decode import decode
    from maco_lib.kernels.one_shot import take_sum

    box = made.box
    bias = problem.bias.contiguous() if problem.bias is not None and box.rank == 0 else None
    residual = None if problem.residual is None else for_tma(problem.residual.contiguous())
    x, weight = in_whole_lines(problem.x), in_whole_lines(problem.weight)
    state.turns.take()
    decode(x, weight, bias, box)
    take_sum(result, residual, box)
    state.turns.give()


TECHNIQUE = Technique(
    "decode",
    lambda problem, plan: run(problem),
    candidates=lambda kind, backends: ["decode"] if kind == "cuda" else [],
    takes_backend=False,
    covers=lambda plan, num_rows: num_rows <= MAX_ROWS,
    suits=suits,
    place=3,
)
