"""A supervised command on a kernel, or in a sandbox, that has no pidfd_open."""

import os
import subprocess
import sys

import psutil
import pytest

from study.harness.files import CHECKOUT

PROGRAM = """
import errno, os, sys
def absent(*arguments):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
os.pidfd_open = absent
from study.harness.supervise import supervise
sys.exit(supervise(["sh", "-c", sys.argv[1]]))
"""


@pytest.fixture
def started():
    """Starts a supervisor of a shell's script."""
    processes = []

    def start(script: str) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        processes.append(subprocess.Popen([sys.executable, "-c", PROGRAM, script], env=environment, text=True, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_the_status_is_the_commands_own_without_pidfd_open(started):
    process = started("exit 7")
    assert process.wait(timeout=60) == 7 and process.stderr.read() == ""


def test_what_it_started_is_gone_with_the_asking_process_without_pidfd_open(started):
    process = started("sleep 600 & echo $!; wait")
    child = psutil.Process(int(process.stdout.readline()))
    process.stdin.close()  # as when the asking process ends
    assert process.wait(timeout=60) == 130 and process.stderr.read() == ""
    assert not child.is_running()
