"""Kernels that wait for a rank that does not come: how long, and what the process is told.

A kernel of ours that waits for a peer for longer than a bound says who did not come, in two words of the host's memory
(`kernels/patience.cuh`), and traps: the GPU's next synchronisation fails, in eager code as in a replayed graph, so that
no wrong sum goes on. The library's next call, and Python when it exits, say what happened. The bound is 10 s, or
MACO_WAIT_S, or `Watch.bound`; 0, and a debugger that is attached to Python: none. Other libraries' kernels have
their own.
"""

import atexit
import ctypes
import os
import sys
import weakref

import torch

from maco_lib.kernels.patience import decoded
from maco_lib.state import State

DEFAULT_S = 10.0


def default_s() -> float:
    """MACO_WAIT_S, else 10 s; none (0) under a debugger, which holds a rank up as long as it likes."""
    given = os.environ.get("MACO_WAIT_S")
    if given is not None:
        return float(given)
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    debugged = sys.gettrace() is not None or monitoring and monitoring.get_tool(monitoring.DEBUGGER_ID)
    return 0.0 if debugged else DEFAULT_S


class Watch:
    """Of one state. address: of the words, on the host as on the GPU."""

    def __init__(self, state: State):
        self.group_name, self.device = state.group.group_name, state.device
        self.words = torch.zeros(2, dtype=torch.int64, pin_memory=True)
        self.address = self.words.data_ptr()
        self.view = (ctypes.c_int64 * 2).from_address(self.address)
        self.bound(default_s())
        state.turns.watches.append(self.check)
        self.turns = state.turns
        weakref.finalize(self, atexit.unregister, tell(weakref.ref(self))).atexit = False

    def bound(self, seconds: float) -> None:
        """How long kernels wait from now on, also those in graphs; 0: for ever."""
        self.seconds = seconds
        self.view[0] = round(seconds * 1e9)

    def destroy(self) -> None:
        """Kernels that use it are done."""
        self.turns.watches.remove(self.check)

    def error(self) -> str:
        """What happened, or ""."""
        if not self.view[1]:
            return ""
        kernel, rank = decoded(self.view[1])
        return (
            f"rank {rank} of group {self.group_name!r} did not come, or waits for one that did not: the kernel "
            f"{kernel!r} on {self.device} waited for it for {self.seconds:g} s (MACO_WAIT_S) and gave up; this process "
            "can do no more on the GPU"
        )

    def check(self) -> None:
        """Raise RuntimeError if a kernel gave up."""
        if self.view[1]:
            raise RuntimeError(self.error())


def tell(reference: weakref.ref):
    """Have Python say at its exit what happened; returns what was registered."""

    def last_words() -> None:
        watch = reference()
        if watch is not None and watch.error():
            print(f"maco_lib: {watch.error()}", file=sys.stderr, flush=True)

    return atexit.register(last_words)
