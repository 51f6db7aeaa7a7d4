"""What `State.prepare` makes: everything that calls on some shapes need, by calling once on each."""

from collections.abc import Sequence

import torch

from maco_lib.linear.norm import linear_all_reduce_norm
from maco_lib.linear.op import linear_all_reduce
from maco_lib.linear.planner import described
from maco_lib.overlap.validation import check_agreement, row_counts
from maco_lib.state import State


def prepare(state: State, weights: Sequence[torch.Tensor], rows: Sequence[int]) -> None:
    """`State.prepare`."""
    group, rows = state.group, row_counts(rows, "prepare")
    for weight in weights:
        check_agreement(lambda weight=weight: described(weight, rows, group), group)
        described(weight, rows, group)
        if weight.device != state.device:
            raise ValueError(f"weight is on {weight.device}, the state on {state.device}")
    if group.size() == 1:
        return
    kinds = {(weight.shape, weight.stride(), weight.dtype): weight.detach() for weight in weights}
    with torch.no_grad():
        # The largest first, for which the buffers of all are made.
        for num_rows in sorted(set(rows), reverse=True):
            for weight in kinds.values():
                call_all(num_rows, weight, state)
        if state.device.type == "cuda":
            torch.cuda.synchronize(state.device)


def call_all(num_rows: int, weight: torch.Tensor, state: State) -> None:
    """Every form of the two operations on one shape: with and without bias and residual."""
    n, k = weight.shape
    x, residual, bias = weight.new_zeros(num_rows, k), weight.new_zeros(num_rows, n), weight.new_zeros(n)
    for its_bias in (None, bias):
        for its_residual in (None, residual):
            linear_all_reduce(x, weight, its_bias, its_residual, state.group)
        linear_all_reduce_norm(x, weight, residual, bias, bias=its_bias, group=state.group)
