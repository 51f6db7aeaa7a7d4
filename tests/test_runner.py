"""Every notebook in the smoke profile through the real runner, and what the command line refuses before it runs."""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import time

import nbformat
import pytest

from maco_lib.machine import this_machine
from maco_lib.study import notebook
from maco_lib.study.sections import SECTIONS
from maco_lib.study.store import Store

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]


def maco(root, *arguments, timeout_s=600):
    # As on a CPU whose matmuls are slow, without bf16 instructions among others, whatever this one has.
    environment = {"ONEDNN_MAX_CPU_ISA": "AVX2", **os.environ, "MACO_ROOT": str(root), "PYTHONPATH": str(CHECKOUT)}
    return subprocess.run([sys.executable, "-m", "maco_lib", *arguments], cwd=CHECKOUT, env=environment,
                          capture_output=True, text=True, timeout=timeout_s)  # fmt: skip


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study root on which the smoke profile ran once, and what the command printed."""
    root = tmp_path_factory.mktemp("study")
    shutil.copytree(CHECKOUT / "data" / "published", root / "data" / "published")
    done = maco(root, "run", "--profile", "smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    return root, done


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_smoke_study_is_whole(study):
    root, _ = study
    store = Store(root)
    (folder,) = store.machines()
    for section in SECTIONS.values():
        record = store.record(folder, section.name)
        assert record["verdict"]["state"] == "complete"
        for dataset in section.datasets:
            rows = store.read(folder, dataset.name)
            assert len(rows) and (rows["error"] == "").all(), rows["error"].unique()
            assert set(store.launches(folder, dataset.name)["launch"]) <= set(record["launches"])
        for figure in section.figures:
            for suffix in ("svg", "pdf", "png", "csv"):
                assert (root / "figures" / folder / f"{figure}.{suffix}").stat().st_size > 0
        book = nbformat.read(root / "data" / folder / "executed" / section.notebook, as_version=4)
        assert any(cell.get("outputs") for cell in book.cells)
    assert {"transformers_eager", "vllm"} <= set(store.read(folder, "inference")["arm"])
    report = (root / "REPORT.md").read_text()
    assert all(f"notebooks/{section.notebook}" in report for section in SECTIONS.values())


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_second_start_measures_nothing(study):
    root, _ = study
    (folder,) = Store(root).machines()
    before = contents(root / "data" / folder)
    begin = time.monotonic()
    done = maco(root, "run", "--profile", "smoke")
    assert done.returncode == 0 and time.monotonic() - begin < 30
    assert done.stdout.count("nothing to measure") == len(SECTIONS)
    assert contents(root / "data" / folder) == before
    assert maco(root, "status").stdout.count("fresh") == len(SECTIONS)


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_report_comes_out_byte_for_byte(study):
    root, _ = study
    paths = [root / "REPORT.md", *sorted((root / "figures").rglob("*.*"))]
    before = [path.read_bytes() for path in paths]
    done = maco(root, "report")
    assert done.returncode == 0, done.stderr
    changed = [path.name for path, content in zip(paths, before, strict=True) if path.read_bytes() != content]
    assert not changed


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_hand_edited_table_is_named_and_the_rest_goes_on(study, tmp_path):
    root = tmp_path / "study"
    shutil.copytree(study[0], root)
    (folder,) = Store(root).machines()
    path = root / "data" / folder / "bandwidth.csv"
    edited = path.read_text().replace("all_reduce", "all_gather", 1)
    path.write_text(edited)
    done = maco(root, "run", "--profile", "smoke", "--keep-going", "--only", "bandwidth,environment")
    assert done.returncode != 0
    assert f"data/{folder}/bandwidth.csv was changed after it was written" in done.stderr
    assert "environment: fresh" in done.stdout
    assert path.read_text() == edited, "stored data stays as it was"
    assert f"data/{folder}/bandwidth.csv was changed" in (root / "REPORT.md").read_text()
    mended = maco(root, "run", "--profile", "smoke", "--force", "--only", "bandwidth")
    assert mended.returncode == 0, mended.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--profile", "huge"], "unknown profile 'huge'; the profiles are smoke, standard, full"),
        (["--only", "overlapp"], "unknown section 'overlapp'; the sections are environment, overlap"),
        (["--machine", "h999-x3"], "machine 'h999-x3' is not one this host"),
        (["-p", "colour=red"], "no chosen section has a parameter 'colour'; valid: "),
        (["-p", "min_iterations=many"], "min_iterations = 'many'"),
        (["-p", "num_ranks=4096", "--only", "overlap"], "num_ranks = 4096, but this machine has"),
        (["-p", "sweep_matmul_n=[4000000]", "--only", "overlap"], "matmul_n = 4000000"),
        (["-p", "model=no-such-model", "--only", "inference"], "no-such-model"),
        (["-p", "nonsense"], "-p takes name=value, not 'nonsense'"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(tmp_path, arguments, says):
    done = maco(tmp_path, "run", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A study root with the reference machines' data, opened on a host that has one GPU and measured nothing yet."""
    shutil.copytree(CHECKOUT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("executed", ".journal"))
    one_gpu = dataclasses.replace(this_machine(), kind="cuda", name="h100-x1", num_devices=1, identity="f" * 16)
    monkeypatch.setenv("MACO_ROOT", str(tmp_path))
    monkeypatch.setattr(notebook, "this_machine", lambda: one_gpu)
    return Store(tmp_path)


def test_a_notebook_opens_on_the_machine_it_names(stored, capsys):
    before = stored.machines()
    run = notebook.begin("overlap", profile="smoke", machine="cpu-2", budget_s=0.5)
    # What is shown was measured with other parameters, and says so.
    recorded = stored.record("cpu-2", "overlap")
    assert run.parameters.model_dump() == recorded["parameters"] and run.profile == recorded["profile"] != "smoke"
    run.measure()
    assert set(run.table("overlap")["backend"]) == {"gloo"}
    run.complete()
    assert "section overlap of cpu-2 is complete" in capsys.readouterr().out
    assert stored.machines() == before
    with pytest.raises(ValueError, match="no parameter 'budget'"):
        notebook.begin("overlap", machine="cpu-2", budget=0.5)


def test_a_notebook_that_cannot_measure_shows_a_reference_machine(stored, capsys):
    run = notebook.begin("overlap")
    run.measure()
    assert "cannot be measured here" in capsys.readouterr().out
    assert run.table("overlap")["num_ranks"].unique() == [4], "the largest machine with GPUs is the reference"
    run.figure("overlap_published")
    run.complete()
    assert stored.record("h100-x1", "overlap")["verdict"]["state"] == "unavailable"
