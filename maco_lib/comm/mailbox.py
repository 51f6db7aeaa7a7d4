"""The inboxes of a group's ranks, in which small data arrive in lines (`kernels.lines`, `kernels.ll128`)."""

import weakref

import torch
import torch.distributed as dist

from maco_lib.comm.peers import peers
from maco_lib.comm.symmetric import require_no_capture
from maco_lib.kernels.inbox import INBOX_BYTES


class Mailbox:
    """Where this rank's peers leave small data. Made once, collective; its kernels run one after the other.

    inboxes: the address of every rank's, beginning with the next rank, own last. counter: int64 (1,), of the launches.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        shared = peers(group, device)
        self.rank = shared.rank
        self.region = shared.memory.allocate(INBOX_BYTES)
        self.region.base.zero_()
        self.inboxes = shared.rotated(self.region.addresses)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        # Nobody may write into an inbox that its owner has yet to clear.
        torch.cuda.synchronize(device)
        dist.barrier(group, device_ids=[device.index])


_MAILBOXES: "weakref.WeakKeyDictionary[dist.ProcessGroup, Mailbox]" = weakref.WeakKeyDictionary()


def mailbox(group: dist.ProcessGroup, device: torch.device) -> Mailbox:
    """The mailbox of `group`, made at the first call; RuntimeError if that is while a graph is captured."""
    if group not in _MAILBOXES:
        require_no_capture("make a group's mailbox")
        _MAILBOXES[group] = Mailbox(group, device)
    return _MAILBOXES[group]
