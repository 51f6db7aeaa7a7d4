"""The sum in lines of 128 bytes, on any number of ranks: right at whatever pace, and nobody waits for ever."""

import os
import pathlib
import shutil
import subprocess

import pytest

from maco_lib import kernels

TESTS = pathlib.Path(__file__).parent
CXX = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("num_ranks", "warps", "passes", "one_shot", "norm", "num_launches"),
    [
        (2, 2, 1, 1, 0, 400),
        (2, 1, 2, 1, 1, 60),
        (3, 2, 1, 0, 1, 60),
        (4, 1, 2, 0, 0, 60),
        (4, 2, 2, 0, 1, 20),
        (4, 1, 1, 1, 1, 60),
        (8, 1, 1, 0, 0, 40),
    ],
)
def test_launch_after_launch_sums_what_every_rank_has(num_ranks, warps, passes, one_shot, norm, num_launches, tmp_path):
    program, headers = tmp_path / "ll128", pathlib.Path(kernels.__file__).parent
    constants = {"RANKS": num_ranks, "WARPS": warps, "PASSES": passes, "ONE_SHOT": one_shot, "NORM": norm}
    macros = [f"-D{name}={value}" for name, value in constants.items()]
    build = [CXX, "-std=c++17", "-O1", *macros, f"-I{headers}", "-o", program, TESTS / "ll128.cpp"]
    subprocess.run(build, check=True, timeout=120)
    found = subprocess.run([program, "1", str(num_launches)], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout
