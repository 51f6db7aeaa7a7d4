"""decode's operands in shared memory: all are multiplied, once they are there, and nothing is overwritten before."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

from maco_lib import kernels

TESTS, HEADER = pathlib.Path(__file__).parent, pathlib.Path(kernels.__file__).parent / "decode_stages.cuh"
CXX = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")


def what_goes_wrong(folder, source, cluster=2, boxes=2, num_cases=1000, odd=False) -> str:
    """In so many cases with the header's source; empty if nothing does."""
    (folder / HEADER.name).write_text(source)
    program = folder / "decode_stages"
    macros = [f"-DCTAS={cluster}", f"-DBOXES={boxes}"]
    macros += [f"-I{folder}", f"-I{HEADER.parent}"]  # the header given, the others as they are
    build = [CXX, "-std=c++17", "-O1", *macros, "-o", program, TESTS / "decode_stages.cpp"]
    subprocess.run(build, check=True, timeout=120)
    command = [program, "1", str(num_cases), str(int(odd))]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout != "") in {(0, False), (1, True)}
    return found.stdout


@pytest.mark.parametrize(("cluster", "boxes", "num_cases"), [(1, 1, 1000), (2, 2, 1500), (4, 4, 300)])
def test_every_step_is_multiplied_once_it_is_there_at_any_pace(cluster, boxes, num_cases, tmp_path):
    assert what_goes_wrong(tmp_path, HEADER.read_text(), cluster, boxes, num_cases) == ""


def test_an_odd_number_of_stages_would_be_found(tmp_path):
    assert "multiplied before it landed" in what_goes_wrong(tmp_path, HEADER.read_text(), odd=True)


FREE = "walk.wait_until_free();"


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("step + (int)stages.count < left && ", "", "comes to a CTA that has gone"),
        ("wait(stages.full(), stages.parity);", "", "multiplied before it landed"),
        (f"{FREE}\n        expect", "expect", "loaded over what is needed|more arrivals than awaited"),
        (f"{FREE}\n#pragma", "\n#pragma", "loaded over what is needed"),
    ],
    ids=["arrivals at the end", "wait for operands", "wait to load the weight", "wait to load x"],
)
def test_what_is_left_out_would_be_found(old, new, found, tmp_path):
    source = HEADER.read_text()
    assert source.count(old) == 1
    assert re.search(found, what_goes_wrong(tmp_path, source.replace(old, new)))
