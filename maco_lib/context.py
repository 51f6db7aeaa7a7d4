"""All state of a group of ranks on a device, as a user holds it.

context = maco_lib.context.of(group, device)          # the group's default context, which public functions use
context.prepare(weights, rows)                        # collective, once: then no call has to make anything
context.close()
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from maco_lib import state as states
from maco_lib.linear.prepare import prepare
from maco_lib.state import State


@dataclass(frozen=True)
class Context:
    """Of a group on a device; made by `of`. What it holds lives as long as the group, or until `close`."""

    state: State

    @property
    def group(self) -> dist.ProcessGroup:
        """The group; RuntimeError where it is gone."""
        return self.state.group

    @property
    def device(self) -> torch.device:
        return self.state.device

    def prepare(self, weights: Sequence[torch.Tensor], rows: Sequence[int]) -> None:
        """Make all that `linear_all_reduce` and its norm need for these weights (N, K) and numbers of rows. Collective.

        Plans, shared memory, flags, kernels and launches: afterwards a call on such a shape, without a bias or with
        one, makes nothing, compiles nothing, and talks to no other rank on the host, so that a CUDA graph can be
        captured at once. Where a shape was tuned (`tune_linear`), with its tuned plan. Raises ValueError on what
        `tune_linear` refuses.
        """
        prepare(self.state, weights, rows)

    def close(self) -> None:
        """Let go of everything: of what is used by no kernel and no graph any more. Every rank calls it.

        The next call makes what it needs anew. Destroying the default group does as much for NCCL's communicators.
        """
        self.state.close()


def of(group: dist.ProcessGroup | None, device: torch.device) -> Context:
    """The default context of `group` (None: all ranks) on this rank's device."""
    return Context(states.of(group, device))
