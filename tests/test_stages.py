"""The persistent kernel's operands in shared memory: nothing is overwritten while it is needed, at whatever pace."""

import os
import pathlib
import shutil
import subprocess

import pytest

from maco_lib import kernels
from maco_lib.linear.techniques.persistent_time import TILINGS

TESTS = pathlib.Path(__file__).parent
CXX = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
# As many pairs of tiles as fit into shared memory, by the columns of one (kernels.persistent.Constants.num_stages).
NUM_STAGES = {128: 3, 96: 4, 64: 5}


@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("columns", sorted({tiling.columns for tiling in TILINGS if tiling.pairs}))
def test_pairs_and_single_tiles_in_any_order_overwrite_nothing_that_is_needed(columns, tmp_path):
    program, headers = tmp_path / "stages", pathlib.Path(kernels.__file__).parent
    macros = [f"-DBN={columns}", f"-DSTAGES={NUM_STAGES[columns]}"]
    build = [CXX, "-std=c++17", "-O1", *macros, f"-I{headers}", "-o", program, TESTS / "stages.cpp"]
    subprocess.run(build, check=True, timeout=120)
    found = subprocess.run([program, "1", "1500"], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout
