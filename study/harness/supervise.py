"""Run a command so that nothing of it outlives the process that asked for it.

    python -m study.harness.supervise COMMAND ...

Standard input is the lifeline: when its other end closes (the asking process ended, however it was killed) or a SIGTERM
or SIGINT comes, every descendant is killed. As a child subreaper this process inherits descendants that lost their
parents (torchrun's ranks and vLLM's engines lead sessions of their own, out of a process group's reach). Linux only.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import threading

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
GRACE_S = 3.0


def prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_descendants(grace_s: float = GRACE_S) -> None:
    """Ask every descendant of this process to end, wait `grace_s` seconds, then kill what is left."""
    remaining = psutil.Process().children(recursive=True)
    for process in remaining:
        with_permission(process.terminate)
    _, remaining = psutil.wait_procs(remaining, timeout=grace_s)
    while remaining := [*remaining, *psutil.Process().children(recursive=True)]:
        for process in remaining:
            with_permission(process.kill)
        psutil.wait_procs(remaining, timeout=1)
        remaining = []


def with_permission(act) -> None:
    try:
        act()
    except psutil.NoSuchProcess:
        return  # it ended by itself, which is what was wanted


class Stopped(Exception):
    """SIGTERM or SIGINT came."""


def supervise(command: list[str]) -> int:
    """Run `command`; returns its exit status, or 130 when it was stopped because the asking process is gone."""

    def stop(number, frame):
        raise Stopped

    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
        ended, tell = os.pipe()
        # A thread waits for the child: not every kernel and sandbox has pidfd_open.
        threading.Thread(target=lambda: (child.wait(), os.close(tell)), daemon=True).start()
        ready, _, _ = select.select([sys.stdin.fileno(), ended], [], [])
        return child.returncode if ended in ready else 130
    except Stopped:
        return 130
    finally:
        kill_descendants()


if __name__ == "__main__":
    status = supervise(sys.argv[1:])
    sys.exit(status if status >= 0 else 128 - status)
