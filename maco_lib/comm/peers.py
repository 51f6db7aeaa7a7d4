"""What our own all-reduces share: the flags and addresses of a group's ranks, and the split of a tensor into shares.

Every rank owns a share of the tensor: it sums the ranks' copies of it (reduce-scatter) and gives the sum to all
(all-gather). In float32, by one rank, in one fixed order: deterministic, and bitwise equal on every rank.
"""

import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric

from maco_lib.comm.symmetric import GRANULE_BYTES, Region, SymmetricAllReduce


class Peers:
    """The flags at which a group's kernels meet, and the addresses that they are given. Made once, collective."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        from maco_lib.kernels import sum_shares as kernel  # needs Triton

        self.kernel, self.group, self.device = kernel, group, device
        self.rank, self.num_ranks = group.rank(), group.size()
        flags = symmetric.empty(kernel.NUM_FLAGS, dtype=torch.int32, device=device).zero_()
        self.handle = symmetric.rendezvous(flags, group.group_name)
        self.own_flags, self.flags = flags, self.tensor(list(self.handle.buffer_ptrs))
        self.epochs = torch.zeros(kernel.MAX_CTAS, dtype=torch.int32, device=device)
        self.made: dict[tuple[int, ...], torch.Tensor] = {}
        # Nobody may signal into flags that their owner has yet to clear.
        torch.cuda.synchronize(device)
        dist.barrier(group, device_ids=[device.index])

    def tensor(self, addresses: list[int]) -> torch.Tensor:
        return torch.tensor(addresses, dtype=torch.int64, device=self.device)

    def addresses(self, *addresses: int) -> torch.Tensor:
        """The addresses on the GPU, int64; copied there once, so before a graph is captured."""
        if addresses not in self.made:
            self.made[addresses] = self.tensor(list(addresses))
        return self.made[addresses]

    def everywhere(self, region: Region, source: torch.Tensor) -> torch.Tensor:
        """Where `source` begins on every rank, beginning with the next rank."""
        offset = source.data_ptr() - region.base.data_ptr()
        starts = region.addresses
        return self.addresses(*[starts[rank] + offset for rank in (*self.others(), self.rank)])

    def others(self) -> list[int]:
        """The other ranks, beginning with the next: at any step every rank works with another one."""
        return [(self.rank + step) % self.num_ranks for step in range(1, self.num_ranks)]

    def share(self, numel: int, itemsize: int, rank: int) -> tuple[int, int]:
        """(begin, end) of `rank`'s share of `numel` elements, in whole granules."""
        granule = GRANULE_BYTES // itemsize
        length = -(-numel // (self.num_ranks * granule)) * granule
        return min(rank * length, numel), min((rank + 1) * length, numel)

    def sum(
        self, sources: torch.Tensor, targets: torch.Tensor, begin: int, end: int, dtype: torch.dtype,
        num_ctas: int, enter: bool, leave: bool,
    ) -> None:  # fmt: skip
        """`kernels.sum_shares` with this group's flags."""
        self.kernel.sum_shares(
            sources, targets, begin, end, dtype, flags=self.flags, epochs=self.epochs,
            rank=self.rank, num_ranks=self.num_ranks, num_ctas=num_ctas, enter=enter, leave=leave,
        )  # fmt: skip


_PEERS: "weakref.WeakKeyDictionary[dist.ProcessGroup, Peers]" = weakref.WeakKeyDictionary()


def peers(group: dist.ProcessGroup, device: torch.device) -> Peers:
    if group not in _PEERS:
        _PEERS[group] = Peers(group, device)
    return _PEERS[group]


@dataclass(frozen=True)
class SharedSum(SymmetricAllReduce):
    """Base of our all-reduces. `num_ctas`: of their kernels."""

    num_ctas: int = 8
    needs: str = "GPUs of one host that can access each other's memory, Triton, bf16, fp16 or fp32"
    dtypes = (torch.bfloat16, torch.float16, torch.float32)

    def unavailable(self, collective: str, device: torch.device, group: dist.ProcessGroup) -> str | None:
        """Why it cannot run here, or None."""
        if why := super().unavailable(collective, device, group):
            return why
        try:
            import triton  # noqa: F401
        except ImportError:
            return f"{self.name} needs Triton, which is not installed"
        return None
