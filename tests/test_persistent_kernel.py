"""The persistent kernel's own code on CPUs, 2 to 4 ranks: right launch after launch, whatever comes when."""

import os
import pathlib
import shutil
import struct
import subprocess
from typing import NamedTuple

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


class Case(NamedTuple):
    num_ranks: int
    columns: int
    width: int
    stages: int
    m: int
    n: int
    k: int
    groups: int
    extras: bool = False
    staggered: bool = False
    last: int = 0


CASES = [
    Case(2, 64, 2, 3, 500, 520, 136, 1),
    Case(2, 32, 1, 4, 300, 200, 328, 1, extras=True),
    Case(2, 64, 2, 3, 700, 520, 72, 1, staggered=True, last=3),
    Case(3, 64, 2, 2, 700, 330, 72, 2, extras=True, staggered=True),
    Case(4, 32, 2, 3, 600, 264, 64, 4, staggered=True),
]
FINISHED, FETCHED = (
    "finish_stores();\n                NOTE(i - begin, STORED);",
    "finish_stores();\n                    raise(",
)


def run(case: Case, folder: pathlib.Path, edits: tuple[tuple[str, str], ...] = ()) -> subprocess.CompletedProcess:
    """Three launches of persistent.cu, with `edits` in its text."""
    tiles, pairs = (-(-case.m // ROWS), -(-case.n // case.columns)), case.width == 2
    order = TileOrder(*tiles, case.num_ranks, 2, case.groups, pairs, case.staggered, case.last)
    assert bool(order.in_pairs) == pairs and (not case.last or order.in_pairs % 4)
    written(order, case.m, case.n, case.k, folder / "problem")
    constants = {
        "RANKS": case.num_ranks, "BN": case.columns, "WIDTH": case.width, "STAGES": case.stages, "FETCH_BUFFERS": 4,
        "HAS_BIAS": int(case.extras), "HAS_RESIDUAL": int(case.extras),
    }  # fmt: skip
    headers = pathlib.Path(kernels.__file__).parent
    text = (headers / "persistent.cu").read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "persistent.cu").write_text(text)
    program, macros = folder / "persistent", [f"-D{name}={value}" for name, value in constants.items()]
    build = [CXX, "-std=c++17", "-O1", "-w", *macros, f"-I{folder}", f"-I{headers}"]
    subprocess.run([*build, "-o", program, TESTS / "persistent.cpp"], check=True, timeout=200)
    return subprocess.run([program, folder / "problem", "1", "3"], capture_output=True, text=True, timeout=250)


@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_launch_after_launch_sums_what_every_rank_has(case, tmp_path):
    found = run(case, tmp_path)
    assert found.returncode == 0, found.stdout


@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("stored", [FINISHED, FETCHED], ids=["finished", "fetched"])
def test_without_the_fence_a_tile_is_read_as_it_was(stored, tmp_path):
    found = run(CASES[1], tmp_path, edits=((stored, stored.replace("finish_stores", "stores_done")),))
    assert found.returncode == 1 and "a wrong sum" in found.stdout
