"""`RowParallelLinear`: a linear layer whose weight is cut along K over the ranks, in place of a torch.nn.Linear."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist

from maco_lib.overlap.linear import linear_all_reduce
from maco_lib.overlap.linear_auto import LinearDecision, tune_linear
from maco_lib.overlap.linear_plan import LinearPlan


class RowParallelLinear(torch.nn.Module):
    """y = sum over the ranks of x @ weight.T, + bias once, + residual once, by `linear_all_reduce`. For inference.

    weight: (N, K), this rank's share of the columns; bias: (N,) or None, whole and the same on every rank. Both become
    parameters without gradients, without a copy. group, plan: as in `linear_all_reduce`.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        plan: LinearPlan | Literal["auto"] | None = "auto",
    ):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)
        self.group, self.plan = group, plan

    @classmethod
    def from_linear(
        cls,
        linear: torch.nn.Linear,
        group: dist.ProcessGroup | None = None,
        plan: LinearPlan | Literal["auto"] | None = "auto",
    ) -> "RowParallelLinear":
        """This rank's share of `linear`, which every rank holds whole: its own columns, copied, and the bias.

        The columns are divided as `torch.tensor_split` does, as is to be the input. Raises ValueError where there are
        fewer of them than ranks, or this rank is not in the group.
        """
        rank, num_ranks = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
        if rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in the group given to RowParallelLinear")
        if linear.in_features < num_ranks:
            raise ValueError(f"in_features = {linear.in_features} cannot be divided among {num_ranks} ranks")
        share = linear.weight.detach().tensor_split(num_ranks, dim=1)[rank]
        return cls(share.clone(memory_format=torch.contiguous_format), linear.bias, group, plan)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x: (..., K), this rank's share of the input; residual: (..., N). Returns (..., N), equal on every rank."""
        return linear_all_reduce(x, self.weight, self.bias, residual, self.group, self.plan)

    def tune(self, num_rows: Sequence[int]) -> dict[int, LinearDecision]:
        """`tune_linear` for this weight and these numbers of rows, all that plan="auto" then looks up. Collective."""
        return tune_linear(self.weight, num_rows, self.group)

    def extra_repr(self) -> str:
        num_features, share = self.weight.shape
        return f"{share} -> {num_features}, bias={self.bias is not None}, {self.plan or LinearPlan()}"
