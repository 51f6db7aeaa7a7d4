"""Every notebook in the smoke profile through the real runner, and what the command line refuses before it runs."""

import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import pytest

from study.__main__ import main
from study.commands import notebook, runner
from study.harness import rates
from study.harness.files import NOTEBOOK_FAILED
from study.harness.machine import this_machine
from study.harness.overrides import parse_overrides
from study.report import figures
from study.results.status import recorded_parameters, section_status
from study.results.store import Store
from study.sections.registry import SECTIONS
from tests import toy

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]


def maco(root, *arguments, timeout_s=1500):
    # As on a CPU whose matmuls are slow, without bf16 instructions among others, whatever this one has.
    environment = {"ONEDNN_MAX_CPU_ISA": "AVX2", **os.environ, "MACO_ROOT": str(root), "PYTHONPATH": str(CHECKOUT)}
    return subprocess.run([sys.executable, "-m", "study", *arguments], cwd=CHECKOUT, env=environment,
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
@pytest.mark.timeout(1800)  # minutes, but on two cores that another test works on too
def test_smoke_study_is_whole(study):
    root, _ = study
    store = Store(root)
    (folder,) = store.machines()
    for section in SECTIONS.values():
        record = store.record(folder, section.name)
        assert record["verdict"]["state"] == "complete"
        parameters, machine = recorded_parameters(section, record), store.measured_machine(folder)
        asked = [dataset for dataset in section.datasets if dataset.points(parameters, machine)]
        assert asked == list(section.datasets) or section.name == "linear_all_reduce"  # some of it is of Hopper GPUs
        for dataset in asked:
            rows = store.read(folder, dataset.name)
            assert len(rows) and (rows["error"] == "").all(), rows["error"].unique()
            assert set(store.launches(folder, dataset.name)["launch"]) <= set(record["launches"])
        for figure in figures.of_section(section.name):
            for suffix in ("svg", "pdf", "png", "csv"):
                assert (root / "figures" / folder / f"{figure}.{suffix}").stat().st_size > 0
        book = json.loads((root / "data" / folder / "executed" / section.notebook).read_text(encoding="utf-8"))
        assert any(cell.get("outputs") for cell in book["cells"])
    arms = set(store.read(folder, "inference")["arm"])  # as many as fit into the minutes here
    assert "transformers_eager" in arms and arms & {"vllm", "vllm_eager"}
    report = (root / "REPORT.md").read_text()
    assert all(f"notebooks/{section.notebook}" in report for section in SECTIONS.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes, but on two cores that another test works on too
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
@pytest.mark.timeout(1800)  # minutes, but on two cores that another test works on too
def test_report_comes_out_byte_for_byte(study):
    root, _ = study
    paths = [root / "REPORT.md", *sorted((root / "figures").rglob("*.*"))]
    before = [path.read_bytes() for path in paths]
    done = maco(root, "report")
    assert done.returncode == 0, done.stderr
    changed = [path.name for path, content in zip(paths, before, strict=True) if path.read_bytes() != content]
    assert not changed


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes, but on two cores that another test works on too
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
        (["bandwidth"], "unknown argument bandwidth; did you mean --only bandwidth?"),
        (["--only", "overlap", "smoke"], "unknown argument smoke; did you mean --profile smoke?"),
        (["--report-only", "--force"], "--report-only measures nothing, so --force means nothing"),
        (["-p", "budget_s=.inf"], "-p budget_s: '.inf' is not a finite number"),
        (["-p", "colour=red"], "no chosen section has a parameter 'colour'; valid: "),
        (["-p", "min_iterations=many"], "min_iterations = 'many'"),
        (["-p", "num_ranks=4096", "--only", "overlap"], "num_ranks = 4096, but this machine has"),
        (["-p", "sweep_matmul_n=[4000000]", "--only", "overlap"], "matmul_n = 4000000"),
        (["-p", "model=no-such-model", "--only", "inference"], "no-such-model"),
        (["-p", "nonsense"], "-p takes name=value, not 'nonsense'"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(tmp_path, arguments, says, monkeypatch, capsys):
    monkeypatch.setenv("MACO_ROOT", str(tmp_path))
    try:
        status = main(["run", *arguments])
    except SystemExit as refused:  # argparse's own way
        status = refused.code
    told = capsys.readouterr().err
    assert status == 2
    assert says in told
    assert "Traceback" not in told
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-2", 0.01), ("010", 10), ("-3", -3), (".5", 0.5), ("[1, 2e3]", [1, 2000.0]), ("no", "no"), ("true", True),
     ("12:30", "12:30"), ("bf16", "bf16"), ("", None), ("1_000", "1_000"), ("0x10", "0x10")],
)  # fmt: skip
def test_values_of_the_command_line_are_what_they_look_like(text, value):
    (read,) = parse_overrides([f"name={text}"]).values()
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1e999", "[1, .inf]"])
def test_what_is_no_finite_number_is_refused(text):
    with pytest.raises(ValueError, match=r"-p budget_s: .* is not a finite number"):
        parse_overrides([f"budget_s={text}"])


@pytest.fixture
def known_rates(monkeypatch):
    """What this machine does is known already: nothing is measured for it."""
    monkeypatch.setattr(rates, "measure", lambda machine, environment, num_ranks: toy.RATES)


@pytest.fixture
def sections_run(tmp_path, monkeypatch, known_rates):
    """A study root on which sections only seem to run; by name what each gives instead of None, and those tried."""
    gives, tried = {}, []

    def run_section(store, folder, job, profile, force):
        assert store.running(folder) == job.section.name
        assert section_status(store, folder, job.section, this_machine()).state == "running"
        tried.append(job.section.name)
        return gives.get(job.section.name)

    monkeypatch.setenv("MACO_ROOT", str(tmp_path))
    monkeypatch.setattr(runner, "run_section", run_section)
    monkeypatch.setattr(runner, "write_report", lambda store: [])
    return gives, tried


def test_a_failed_section_costs_only_itself(sections_run, capsys, monkeypatch):
    gives, tried = sections_run
    gives["overlap"] = "LaunchError: it broke\nfurther down"
    asked = ["budget_s=1e-2", "batches=[1]"]
    assert runner.run([], "smoke", asked, "auto", False) == 1
    assert tried == ["environment", "overlap", "inference", "bandwidth", "linear_all_reduce"]
    *_, failed, first, second, last = capsys.readouterr().err.splitlines()
    assert failed == "Failed: overlap, when_to_overlap; what was measured is kept."
    assert first == "  overlap: LaunchError: it broke"
    assert second == "  when_to_overlap: not run: it needs overlap of section overlap, which failed"
    assert last == "To go on: ./run_all.sh --only overlap,when_to_overlap --profile smoke -p budget_s=1e-2"
    gives.clear()
    monkeypatch.setattr(runner, "lacking", lambda *_: None)
    words = shlex.split(last.removeprefix("To go on: ./run_all.sh "))
    assert main(["run", *words]) == 0, "the command is one that runs"
    assert tried[-2:] == ["overlap", "when_to_overlap"]


def test_a_section_is_tried_where_the_tables_of_a_failed_one_are_stored(sections_run):
    gives, tried = sections_run
    gives["overlap"] = "LaunchError: it broke"
    store = Store()
    folder = store.folder_for(this_machine())
    for table in SECTIONS["overlap"].tables:
        (store.journal_folder(folder).parent / f"{table}.csv").write_text("earlier\n")
    assert runner.run(["overlap", "when_to_overlap"], "smoke", [], "auto", False) == 1
    assert tried == ["overlap", "when_to_overlap"]


def test_report_only_draws_what_is_asked_with_options_in_any_order(stored, monkeypatch):
    from study.report import publish, report

    drawn, built = [], []
    monkeypatch.setattr(figures, "write", lambda store, folder, name: drawn.append((folder, name)))
    monkeypatch.setattr(report, "build", lambda root, redraw=True, **_: built.append(redraw) or [])
    monkeypatch.setattr(publish, "build", lambda root: [])
    assert main(["run", "--only", "overlap", "--report-only", "--machine", "h200-x2"]) == 0
    assert drawn == [("h200-x2", name) for name in figures.of_section("overlap")] and built == [False]
    assert main(["run", "--report-only"]) == 0 and built == [False, True]
    drawn.clear()
    assert main(["run", "--report-only", "--only", "inference"]) == 0
    assert {folder for folder, _ in drawn} == {"cpu-2", "h200-x2"}, "where section 2 was measured"


def test_what_a_notebook_raised_is_its_sections_error_whole(tmp_path):
    log = tmp_path / "log"
    error = "LaunchError: no progress\n" + "\n".join(f"rank {rank}: here" for rank in range(40))
    log.write_text(f"[IPKernelApp] WARNING | chatter\n{NOTEBOOK_FAILED}\n{error}\n")
    assert runner.judge(Store(tmp_path), "here", SECTIONS["overlap"], "run", 1, log) == error
    log.write_text("[IPKernelApp] WARNING | chatter\nModuleNotFoundError: papermill\n")
    assert runner.judge(Store(tmp_path), "here", SECTIONS["overlap"], "run", 1, log) == "ModuleNotFoundError: papermill"


def test_a_run_tells_that_it_is_at_work_only_while_it_lives(tmp_path):
    store, section = Store(tmp_path), SECTIONS["bandwidth"]
    here = this_machine()
    store.write_record("here", section.name, {"parameters": {}, "verdict": {"state": "running"}})
    program = f"""
import pathlib, sys
from study.results.store import Store
with Store(pathlib.Path({str(tmp_path)!r})).at_work("here") as tell:
    tell("bandwidth")
    print("at work", flush=True)
    sys.stdin.read()
"""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes) as process:
        assert process.stdout.readline() == b"at work\n"
        assert section_status(store, "here", section, here).state == "running"
        assert section_status(store, "here", SECTIONS["overlap"], here).state == "missing"
        with pytest.raises(RuntimeError, match="another run is at work in data/here"), store.at_work("here"):
            pass
        process.kill()
    assert section_status(store, "here", section, here).state == "interrupted"


def test_a_folder_that_cannot_be_worked_in_is_named(tmp_path, monkeypatch, capsys, known_rates):
    monkeypatch.setenv("MACO_ROOT", str(tmp_path))
    (tmp_path / "data").write_text("not a folder")
    assert main(["run", "--profile", "smoke"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/data")
    (tmp_path / "data").unlink()

    def no_locks(stream, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert main(["run", "--profile", "smoke"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "run.lock cannot be written and locked: No locks available" in line


def test_output_is_told_as_far_as_the_terminal_has_letters_and_a_reader_listens():
    command = [sys.executable, "-m", "study", "advise", "--model", "Qwen3-8B", "--tokens", "512", "--tp", "2"]
    environment = {**os.environ, "MACO_ROOT": str(CHECKOUT), "PYTHONPATH": str(CHECKOUT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stderr == b"" and done.stdout.isascii() and done.stdout
    piped = shlex.join(command) + " | head -c 1"
    done = subprocess.run(["bash", "-c", piped], cwd=CHECKOUT, env=environment, capture_output=True, timeout=120)
    assert done.stderr == b"" and len(done.stdout) == 1


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


def test_a_notebook_that_cannot_measure_shows_a_reference_machine(stored, capsys, known_rates):
    run = notebook.begin("overlap")
    run.measure()
    assert "cannot be measured here" in capsys.readouterr().out
    assert run.table("overlap")["num_ranks"].unique() == [4], "the largest machine with GPUs is the reference"
    run.figure("overlap_published")
    run.complete()
    assert stored.record("h100-x1", "overlap")["verdict"]["state"] == "unavailable"
