"""Our one-shot all-reduce in symmetric memory: every rank reads all copies and sums them in the order of the ranks.

It writes the sum to any memory of its own, so what was computed in symmetric memory needs no copy out. With 2 ranks it
moves as much as two-shot, with P ranks P / 2 times that.
"""

from dataclasses import dataclass

import torch

from maco_lib.comm.peers import Peers, SharedSum
from maco_lib.comm.symmetric import Region
from maco_lib.kernels.launch import Launch


@dataclass(frozen=True)
class PullOneShot(SharedSum):
    """Out of place: the peers read the input to the end."""

    num_ctas: int = 64
    in_place = False

    def launch(self, region: Region, source: torch.Tensor, result: torch.Tensor, shared: Peers) -> Launch:
        from maco_lib.kernels.sum_shares import sum_shares

        offset = source.data_ptr() - region.base.data_ptr()
        # By rank, not beginning with the next one: the order of the sum is to be the same everywhere.
        sources = tuple(address + offset for address in region.addresses)
        own, how = (result.data_ptr(),), {"num_ctas": self.num_ctas, "enter": True, "leave": True}
        return sum_shares(sources, own, 0, source.numel(), source.dtype, shared.at, **how)


BACKENDS = (PullOneShot("maco_one_shot_64"),)
PLACE = 6
