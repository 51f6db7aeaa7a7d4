"""What every test shares: a scratch data folder, and the rule that GPU tests run wherever there are enough GPUs."""

import functools
import os
import shutil
import tempfile

import pytest

SCRATCH = tempfile.TemporaryDirectory(prefix="maco-tests-")
# Stores opened without a folder, here or in a child process, must not touch the checkout's data.
os.environ["MACO_ROOT"] = SCRATCH.name
# An interrupted or busy hub must not decide a test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


# The slow tests of this file share a run of minutes.
TOGETHER = {"tests/test_runner.py"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Every test goes to the next free worker, whatever its file, except for those that go together."""
    from xdist.scheduler import LoadScopeScheduling

    class TestByTest(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file in TOGETHER else nodeid

    return TestByTest(config, log)


@functools.cache
def num_gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    import torch

    return torch.cuda.device_count()


def pytest_collection_modifyitems(items):
    for item in items:
        for marker in item.iter_markers("gpu"):
            needed = marker.kwargs.get("num_gpus", marker.args[0] if marker.args else 1)
            if num_gpus() < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} NVIDIA GPUs, this machine has {num_gpus()}"))
