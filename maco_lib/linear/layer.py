"""`RowParallelLinear`: a linear layer whose weight is cut along K over the ranks, in place of a torch.nn.Linear."""

import copy
import pickle
from collections.abc import Iterable
from typing import Literal

import torch
import torch.distributed as dist

from maco_lib.linear.op import linear_all_reduce
from maco_lib.linear.plan import LinearPlan
from maco_lib.linear.planner import LinearDecision, tune_linear
from maco_lib.overlap.validation import num_ranks_of


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
        num_ranks = num_ranks_of(group, "RowParallelLinear")
        rank = dist.get_rank(group) if num_ranks > 1 else 0
        if linear.in_features < num_ranks:
            raise ValueError(f"in_features = {linear.in_features} cannot be divided among {num_ranks} ranks")
        share = linear.weight.detach().tensor_split(num_ranks, dim=1)[rank]
        return cls(share.clone(memory_format=torch.contiguous_format), linear.bias, group, plan)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x: (..., K), this rank's share of the input; residual: (..., N). Returns (..., N), equal on every rank."""
        return linear_all_reduce(x, self.weight, self.bias, residual, self.group, self.plan)

    def tune(self, num_rows: Iterable[int]) -> dict[int, LinearDecision]:
        """`tune_linear` for this weight and these numbers of rows, all that plan="auto" then looks up. Collective."""
        return tune_linear(self.weight, num_rows, self.group)

    def __deepcopy__(self, memo: dict) -> "RowParallelLinear":
        """Parameters of its own, and the same group, of which there is one in a process."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        memo[id(self.group)] = self.group
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __getstate__(self) -> dict:
        if self.group is not None:
            raise pickle.PicklingError(
                "a RowParallelLinear with a group cannot be pickled, as the group is this process's: "
                "save its state_dict(), or make it with group=None"
            )
        return self.__dict__.copy()

    def extra_repr(self) -> str:
        num_features, share = self.weight.shape
        return f"{share} -> {num_features}, bias={self.bias is not None}, {self.plan or LinearPlan()}"
