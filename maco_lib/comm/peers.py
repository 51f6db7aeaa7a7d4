"""What our own all-reduces share: the flags and buffers at which a group's ranks meet, and the split into shares.

Every rank owns a share of the tensor: it sums the ranks' copies of it (reduce-scatter) and gives the sum to all
(all-gather). Every sum is formed by one rank, in one fixed order: deterministic, and bitwise equal on every rank.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric

from maco_lib import state as states
from maco_lib.comm.symmetric import GRANULE_BYTES, Memory, Region, SymmetricAllReduce, require_no_capture
from maco_lib.comm.watch import Watch
from maco_lib.kernels.launch import Launch, Launches
from maco_lib.state import State

MAX_ELEMENTS = 2**31 - 1


class Peers:
    """A group's ranks, as kernels see them: lists by rank begin with the next rank and end with this one.

    So at any step every rank works with another one. Made once; collective. at: what kernels need to know of the flags.
    """

    def __init__(self, state: State):
        require_no_capture("make a group's flags")
        from maco_lib.kernels import meet  # needs Triton

        group, device = state.group, state.device
        self.memory, self.together = state.get(Memory), state.together
        self.rank, self.num_ranks = group.rank(), group.size()
        self.others = [(self.rank + step) % self.num_ranks for step in range(1, self.num_ranks)]
        self.own_flags = symmetric.empty(meet.NUM_FLAGS, dtype=torch.int32, device=device).zero_()
        self.handle = symmetric.rendezvous(self.own_flags, group.group_name)
        self.epochs = torch.zeros(meet.MAX_CTAS, dtype=torch.int32, device=device)
        flags = self.rotated(list(self.handle.buffer_ptrs))
        self.at = meet.Flags(flags, self.epochs.data_ptr(), self.rank, state.get(Watch).address, device.index)
        self.inbox: Region | None = None
        self.prepared = Launches()  # of whole sums, by what they sum
        # Nobody may signal into flags that their owner has yet to clear.
        torch.cuda.synchronize(device)
        dist.barrier(group, device_ids=[device.index])

    def rotated(self, by_rank: list[int], offset: int = 0) -> tuple[int, ...]:
        return tuple(by_rank[rank] + offset for rank in (*self.others, self.rank))

    def everywhere(self, region: Region, tensor: torch.Tensor) -> tuple[int, ...]:
        """Where every rank's copy of `tensor`, which lies in `region`, begins."""
        return self.rotated(region.addresses, tensor.data_ptr() - region.base.data_ptr())

    def share(self, numel: int, itemsize: int, rank: int) -> tuple[int, int]:
        """(begin, end) of `rank`'s share of `numel` elements, in whole granules; it may be empty."""
        length = self.share_length(numel, itemsize)
        return min(rank * length, numel), min((rank + 1) * length, numel)

    def share_length(self, numel: int, itemsize: int) -> int:
        """Elements of every share but the last; ValueError where 32 bits cannot count the tensor's."""
        if numel > MAX_ELEMENTS:
            raise ValueError(f"{numel} elements are more than the kernels can count, {MAX_ELEMENTS}")
        granule = GRANULE_BYTES // itemsize
        return -(-numel // (self.num_ranks * granule)) * granule

    def inboxes(self, num_bytes: int) -> Region:
        """Where peers leave data for this rank, at least `num_bytes`; collective when it has to grow."""
        inbox, self.inbox = self.inbox, self.memory.grown(self.inbox, num_bytes)
        if self.inbox is not inbox:
            self.prepared.clear()  # with the inbox before
        return self.inbox

    def sum(
        self, sources: tuple[int, ...], targets: tuple[int, ...], begin: int, end: int, dtype: torch.dtype,
        size: Hashable, *, num_ctas: int, enter: bool, leave: bool,
    ) -> None:  # fmt: skip
        """`kernels.sum_shares` among these ranks; size: as in `issue`."""
        from maco_lib.kernels.sum_shares import sum_shares

        self.issue(
            sum_shares(sources, targets, begin, end, dtype, self.at, num_ctas=num_ctas, enter=enter, leave=leave), size
        )

    def issue(self, launch: Callable[[], None], size: Hashable) -> None:
        """Launch; the first time for a size, the same on every rank, once all of them have compiled what they need."""
        self.together(size)
        launch()

    def give(self, region: Region, part: torch.Tensor) -> None:
        """Have the copy engine write `part`, a part of `region`, to the other ranks, and wait for theirs."""
        if part.numel():
            for rank in self.others:
                region.peer(rank, part).copy_(part)
        # A kernel that sums nothing: its leave tells the others that the copies before it have arrived.
        own = (region.base.data_ptr(),)
        self.sum(own, own, 0, 0, torch.float32, "give", num_ctas=1, enter=False, leave=True)


@dataclass(frozen=True)
class SharedSum(SymmetricAllReduce):
    """Base of our all-reduces. `num_ctas`: of their kernels.

    Needs GPUs of one host that can access each other's memory, Triton, bf16, fp16 or fp32.
    """

    num_ctas: int = 8
    dtypes = (torch.bfloat16, torch.float16, torch.float32)

    def launch(self, region: Region, source: torch.Tensor, result: torch.Tensor, shared: Peers) -> Launch:
        """The kernel that does all of `reduce`, ready."""
        raise NotImplementedError

    def reduce(self, region: Region, source: torch.Tensor, result: torch.Tensor, group: dist.ProcessGroup) -> None:
        shared = states.of(group, source.device).get(Peers)
        key = self.name, source.data_ptr(), result.data_ptr(), source.numel(), source.dtype
        launch = shared.prepared.get(key)
        if launch is None:
            launch = shared.prepared.keep(key, self.launch(region, source, result, shared))
        shared.issue(launch, self.size(source))

    def size(self, source: torch.Tensor) -> Hashable:
        """What is compiled for about such a source."""
        return self.name, source.dtype, source.numel().bit_length()

    def unavailable(self, collective: str, device: torch.device, group: dist.ProcessGroup) -> str | None:
        """Why it cannot run here, or None."""
        if why := super().unavailable(collective, device, group):
            return why
        try:
            from maco_lib.kernels.meet import MAX_RANKS
        except ImportError:
            return f"{self.name} needs Triton, which is not installed"
        return f"{self.name} is for {MAX_RANKS} ranks, not {group.size()}" if group.size() > MAX_RANKS else None
