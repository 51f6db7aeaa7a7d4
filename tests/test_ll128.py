"""The sum in lines of 128 bytes, on any number of ranks: right at whatever pace, and nobody waits for ever."""

import os
import pathlib
import shutil
import subprocess

import pytest

from maco_lib import kernels
from maco_lib.kernels.patience import decoded

TESTS = pathlib.Path(__file__).parent
CXX = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def built(folder: pathlib.Path, **constants: int) -> pathlib.Path:
    program, headers = folder / "ll128", pathlib.Path(kernels.__file__).parent
    macros = [f"-D{name}={value}" for name, value in constants.items()]
    build = [CXX, "-std=c++17", "-O1", *macros, f"-I{headers}", "-o", program, TESTS / "ll128.cpp"]
    subprocess.run(build, check=True, timeout=120)
    return program


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
    constants = {"RANKS": num_ranks, "WARPS": warps, "PASSES": passes, "ONE_SHOT": one_shot, "NORM": norm}
    command = [built(tmp_path, **constants), "1", str(num_launches), "-1"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout


@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("num_ranks", "one_shot", "absent"), [(2, 1, 0), (2, 0, 1), (4, 1, 2)])
def test_a_rank_that_never_comes_is_named_by_those_that_wait(num_ranks, one_shot, absent, tmp_path):
    constants = {"RANKS": num_ranks, "WARPS": 1, "PASSES": 1, "ONE_SHOT": one_shot, "NORM": 0, "POLLS": 4}
    command = [built(tmp_path, **constants), "1", "40", str(absent)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 2, found.stdout
    assert decoded(int(found.stdout.removeprefix("gave up: "))) == ("ll128", absent)
