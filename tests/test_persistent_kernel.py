"""The persistent kernel's own code on CPUs, 2 to 4 ranks: right launch after launch, whatever comes when."""

import os
import pathlib
import shutil
import struct
import subprocess

import pytest

from maco_lib import kernels
from maco_lib.kernels.tile_order import ROWS, TileOrder

TESTS = pathlib.Path(__file__).parent
CXX = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def written(order: TileOrder, m: int, n: int, k: int, path: pathlib.Path) -> None:
    """The sizes and every rank's tables, as int32."""
    numbers = [m, n, k, order.num_clusters, order.num_slots]
    for rank in range(order.num_ranks):
        for table in order.tables(rank):
            numbers += [table.size, *table.ravel().tolist()]
    path.write_bytes(struct.pack(f"{len(numbers)}i", *numbers))


@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("num_ranks", "columns", "width", "stages", "m", "n", "k", "groups", "extras", "staggered"),
    [
        (2, 64, 2, 3, 500, 520, 136, 1, 0, False),
        (2, 32, 1, 4, 300, 200, 328, 1, 1, False),
        (3, 64, 2, 2, 700, 330, 72, 2, 1, True),
        (4, 32, 2, 3, 600, 264, 64, 4, 0, True),
    ],
)
def test_launch_after_launch_sums_what_every_rank_has(
    num_ranks, columns, width, stages, m, n, k, groups, extras, staggered, tmp_path
):
    tiles = -(-m // ROWS), -(-n // columns)
    order = TileOrder(*tiles, num_ranks, 2, num_groups=groups, pairs=width == 2, staggered=staggered)
    assert bool(order.pair_waves) == (width == 2)
    written(order, m, n, k, tmp_path / "problem")
    constants = {
        "RANKS": num_ranks, "BN": columns, "WIDTH": width, "STAGES": stages, "FETCH_BUFFERS": 4,
        "HAS_BIAS": extras, "HAS_RESIDUAL": extras,
    }  # fmt: skip
    program, headers = tmp_path / "persistent", pathlib.Path(kernels.__file__).parent
    macros = [f"-D{name}={value}" for name, value in constants.items()]
    build = [CXX, "-std=c++17", "-O2", "-w", *macros, f"-I{headers}", "-o", program, TESTS / "persistent.cpp"]
    subprocess.run(build, check=True, timeout=200)
    found = subprocess.run([program, tmp_path / "problem", "1", "3"], capture_output=True, text=True, timeout=250)
    assert found.returncode == 0, found.stdout
