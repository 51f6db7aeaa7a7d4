"""The inboxes of a group's ranks, in which small data arrive in lines (`kernels.lines`, `kernels.ll128`)."""

import torch
import torch.distributed as dist

from maco_lib.comm.peers import Peers
from maco_lib.comm.symmetric import require_no_capture
from maco_lib.comm.watch import Watch
from maco_lib.kernels.inbox import INBOX_BYTES, Box
from maco_lib.state import State


class Mailbox:
    """Where this rank's peers leave small data. Made once, collective; its kernels run one after the other.

    box: what the kernels need to know of it.
    """

    def __init__(self, state: State):
        require_no_capture("make a group's mailbox")
        shared, device = state.get(Peers), state.device
        self.region = shared.memory.allocate(INBOX_BYTES)
        self.region.base.zero_()
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.box = Box(
            shared.rotated(self.region.addresses), self.counter.data_ptr(), shared.rank, state.get(Watch).address,
            device.index, together=state.together,
        )  # fmt: skip
        # Nobody may write into an inbox that its owner has yet to clear.
        torch.cuda.synchronize(device)
        dist.barrier(state.group, device_ids=[device.index])
