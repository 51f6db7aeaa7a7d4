"""The machinery between a point and a table: resume, repeats, failure, kills, damaged files, machine folders."""

import dataclasses
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import stored

from study.commands import derive
from study.harness.machine import this_machine
from study.harness.rows import aggregate, agree, as_csv
from study.results import evidence, launch
from study.results.status import Status, section_status
from study.results.store import DataError, Store
from study.sections import registry as sections
from tests import toy

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setitem(sections.SECTIONS, "toy", toy.SECTION)
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "measured"))
    result = Store(tmp_path)
    result.claim(this_machine(), "here")
    return result


@pytest.fixture(scope="module")
def measured_once(tmp_path_factory):
    """A study root in which the toy's default points are measured."""
    root = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sections.SECTIONS, "toy", toy.SECTION)
        patch.setenv("TOY_LOG", str(root / "measured"))
        store = Store(root)
        store.claim(this_machine(), "here")
        assert measure(store) == {1: 1, 2: 1, 3: 1}
    return root


@pytest.fixture
def measured(store, measured_once):
    shutil.copytree(measured_once / "data", store.data, dirs_exist_ok=True)
    return store


def measure(store, force=False, **parameters):
    """Measure the toy; returns how often the program was asked for each size, by this call alone."""
    log = pathlib.Path(os.environ["TOY_LOG"])
    log.write_text("")
    try:
        launch.measure(store, "here", toy.DATASET, toy.ToyParameters(**parameters), this_machine(), toy.RATES, force)
    finally:
        asked = [int(line) for line in log.read_text().split()]
        measure.asked = {size: asked.count(size) // 2 for size in set(asked)}
    return measure.asked


def test_only_what_is_missing_is_measured(measured):
    store = measured
    assert store.read("here", "toy")["time_us"].tolist() == [3.0, 6.0, 9.0]
    assert measure(store) == {}
    assert measure(store, sizes=[1, 4]) == {4: 1}
    assert store.read("here", "toy")["size"].tolist() == [1, 4]
    assert measure(store, sizes=[3, 2]) == {}, "going back to earlier parameters measures nothing"
    assert store.read("here", "toy")["size"].tolist() == [3, 2]
    assert measure(store, sizes=[3, 2], force=True) == {2: 1, 3: 1}


def test_repeats_are_separate_launches(measured):
    assert measure(measured, sizes=[2], num_launches=3) == {2: 2}, "one was measured before"
    row = measured.read("here", "toy").iloc[0]
    assert row["num_launches"] == 3
    assert measured.launches("here", "toy")["launch"].nunique() == 3
    assert set(measured.samples("here", "toy")["rank"]) == {0, 1}
    assert len(measured.record("here", "toy")["launches"]) == 3


def test_launches_are_aggregated_conservatively():
    rows = pd.DataFrame({
        "point_key": "k", "repeat": [0, 1, 2], "launch": ["a", "b", "c"], "method_version": 1, "arm": "x",
        "bytes": 2**30, "time_us": [5.0, 3.0, 4.0], "time_lo_us": [4.0, 2.5, 3.5], "time_hi_us": [6.0, 3.5, 9.0],
        "correct": True, "error": "",
    })  # fmt: skip
    row = aggregate(rows, ["arm"]).iloc[0]
    assert (row["time_us"], row["time_lo_us"], row["time_hi_us"], row["num_launches"]) == (4.0, 2.5, 9.0, 3)
    assert row["bytes"] == 2**30 and b"1073741824" in as_csv(aggregate(rows, ["arm"]))
    wrong = aggregate(rows.assign(correct=[True, False, True], error=["", "3 elements are wrong", ""]), ["arm"]).iloc[0]
    assert not wrong["correct"] and wrong["error"] == "3 elements are wrong" and pd.isna(wrong["time_us"])


def test_many_launches_narrow_the_interval_to_how_far_they_differ():
    def reported(times_us: list[float]) -> tuple[float, float]:
        rows = pd.DataFrame({
            "point_key": "k", "arm": "x", "launch": list(map(str, times_us)), "time_us": times_us,
            "time_lo_us": [time / 2 for time in times_us], "time_hi_us": [time * 2 for time in times_us],
        })  # fmt: skip
        row = aggregate(rows, ["arm"]).iloc[0]
        return row["time_lo_us"], row["time_hi_us"]

    assert reported([5.0, 1.0, 4.0, 2.0, 3.0]) == (0.5, 10.0), (
        "few say nothing of the spread: every interval is covered"
    )
    assert reported([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == (1.0, 6.0)
    assert reported([5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 7.0, 90.0, 8.0]) == (2.0, 8.0)


def test_a_point_may_get_more_launches_than_the_others(measured):
    dataset = dataclasses.replace(toy.DATASET, launches=lambda parameters, point: 2 if point["size"] == 2 else 1)
    assert launch.measure(measured, "here", dataset, toy.ToyParameters(), this_machine(), toy.RATES) == 1
    assert measured.read("here", "toy")["num_launches"].tolist() == [1, 2, 1]
    assert launch.measure(measured, "here", dataset, toy.ToyParameters(), this_machine(), toy.RATES) == 0


def test_a_failure_keeps_finished_points_and_stored_data(measured):
    before = (measured.data / "here" / "toy.csv").read_bytes()
    with pytest.raises(launch.LaunchError, match="the toy breaks at size 5"):
        measure(measured, sizes=[4, 5], fail_at=5)
    assert (measured.data / "here" / "toy.csv").read_bytes() == before
    assert measure(measured, sizes=[4]) == {}, "size 4 was finished before the failure"


def test_a_run_that_cannot_go_on_leaves_its_finished_points_to_the_report(store):
    parameters = toy.ToyParameters(sizes=[2, 3], fail_at=3)
    begun = {"profile": "smoke", "parameters": parameters.model_dump(), "verdict": {"state": "running"}}
    store.write_record("here", "toy", begun)
    with pytest.raises(launch.LaunchError):
        measure(store, sizes=[2, 3], fail_at=3)
    assert "toy" not in evidence.load(store, "here")[0].tables
    assert derive.rederive(store, "here") == ["toy"]
    machine, problems = evidence.load(store, "here")
    assert machine.tables["toy"]["size"].tolist() == [2] and not problems
    state = machine.sections["toy"]
    assert (state.state, state.error) == ("interrupted", "a run began and did not end; toy: 1 of 2 points not measured")
    assert measure(store, sizes=[2, 3]) == {3: 1}, "a later run goes on from there"


def test_a_section_that_only_computes_is_computed_where_it_never_ran(tmp_path):
    store, section = stored.study(tmp_path), sections.SECTIONS["when_to_overlap"]
    before = store.read("h200-x2", "model_shares")
    for path in (store.data / "h200-x2").glob("when_to_overlap.*"):
        path.unlink()
    stored.settle(store, "overlap", "failed")
    assert derive.compute_section(store, "h200-x2", section) == [] == list(store.record("h200-x2", section.name))
    stored.settle(store, "overlap", "complete")
    assert derive.compute_section(store, "h200-x2", section) == ["when_to_overlap", "model_shares"]
    pd.testing.assert_frame_equal(store.read("h200-x2", "model_shares"), before)
    record = store.record("h200-x2", section.name)
    assert record["profile"] == "full" and record["verdict"]["run"] == "rederive"
    assert section.parameters(**record["parameters"]) == section.parameters()


@pytest.mark.slow
def test_rederive_changes_nothing_that_is_stored(tmp_path):
    for folder in sorted(path.parent.name for path in CHECKOUT.glob("data/*/machine.json")):
        store = Store(tmp_path)
        shutil.copytree(CHECKOUT / "data" / folder, store.data / folder, ignore=shutil.ignore_patterns("executed"))
        before = {path: path.read_bytes() for path in (store.data / folder).iterdir() if path.is_file()}
        derive.rederive(store, folder)
        assert {path: path.read_bytes() for path in before} == before, folder


def test_rederive_writes_what_a_formula_changed(tmp_path, monkeypatch):
    store, folder = Store(tmp_path), "cpu-2"
    shutil.copytree(CHECKOUT / "data" / folder, store.data / folder, ignore=shutil.ignore_patterns("executed"))
    before = {path: path.read_bytes() for path in (store.data / folder).iterdir() if path.is_file()}
    assert "when_to_overlap" in derive.rederive(store, folder)
    assert {path: path.read_bytes() for path in before} == before
    entry, table = sections.table("bandwidth_fit")
    other = dataclasses.replace(table, compute=lambda tables, parameters: (
        table.compute(tables, parameters).assign(bandwidth_gb_per_s=lambda rows: rows["bandwidth_gb_per_s"] * 1.0001)
    ))  # fmt: skip
    monkeypatch.setitem(sections.SECTIONS, entry.name, dataclasses.replace(entry, derived=(other,)))
    derive.rederive(store, folder)
    changed = [path.name for path, content in before.items() if path.read_bytes() != content]
    assert sorted(changed) == ["bandwidth.json", "bandwidth_fit.csv"]


def test_tables_agree_to_the_digits_that_can_be_known():
    stored_rows = pd.DataFrame(
        {"name": ["a", None], "time_us": [1000.0, None], "ect_us": [1.0, None], "eta": [0.5, 1.0]}
    )
    assert agree(stored_rows, stored_rows.copy())
    assert agree(stored_rows, stored_rows.assign(ect_us=[1.01, None])), "a difference of times of 1000 µs"
    for other in ({"ect_us": [1.1, None]}, {"time_us": [1000.1, None]}, {"eta": [0.51, 1.0]}, {"name": ["b", None]},
                  {"time_us": [1000.0, 1.0]}, {"more": 1}):  # fmt: skip
        assert not agree(stored_rows, stored_rows.assign(**other)), other


def test_slow_is_not_stuck_and_what_is_stuck_says_where(store, monkeypatch):
    monkeypatch.setattr(launch, "stall_bound", lambda longest_step_s: 3.0)
    begin = time.monotonic()
    with pytest.raises(
        launch.LaunchError, match="made no progress on any rank for 3 s, after 1 of 2 points"
    ) as stopped:
        measure(store, sizes=[1, 2], seconds=4.0, hang_at=2)
    assert time.monotonic() - begin < 120
    text = str(stopped.value)
    for rank in (0, 1):
        # The first point took longer than the bound, in steps; what the ranks were at is where the second hangs.
        assert f"rank {rank}: step 43," in text and "size=2" in text
    assert text.count('File "tests/toy_program.py"') >= 2 and " in measure" in text
    assert "torch.distributed" not in text and "Traceback" not in text, "nothing of our own signal"
    assert len(list(store.journal_folder("here").glob("*.stacks"))) == 2
    assert not toy_processes(store)


def test_the_bound_follows_from_the_longest_step_forecast():
    assert launch.stall_bound(0.1) == 120.0
    points = toy.points(toy.ToyParameters(seconds=30.0), this_machine())
    assert launch.stall_bound(toy.DATASET.longest_step_s(points, toy.RATES)) == 300.0
    quick = toy.points(toy.ToyParameters(seconds=0.0), this_machine())
    assert toy.DATASET.longest_step_s(quick, toy.RATES) == toy.RATES.start_s


def test_more_ranks_than_devices_is_refused(store):
    with pytest.raises(ValueError, match="num_ranks = 4096, but this machine has"):
        measure(store, num_ranks=4096)


def test_status_counts_rows_whose_arm_failed(measured):
    store = measured
    complete = {"parameters": toy.ToyParameters().model_dump(), "verdict": {"state": "complete"}}
    store.write_record("here", "toy", {**store.record("here", "toy"), **complete})
    assert section_status(store, "here", toy.SECTION, this_machine()) == Status("fresh")
    rows = store.read("here", "toy").assign(correct=[True, False, True], error=["", "3 elements are wrong", ""])
    store.write_table("here", toy.DATASET, rows, {"keys": rows["point_key"].tolist()})
    status = section_status(store, "here", toy.SECTION, this_machine())
    assert status == Status("fresh", "toy: 1 of 3 rows failed") and status.settled


def test_a_changed_file_is_named(measured):
    store = measured
    path = store.data / "here" / "toy.csv"
    path.write_text(path.read_text().replace("9", "8"))
    with pytest.raises(DataError, match=r"data/here/toy\.csv was changed"):
        store.read("here", "toy")
    store.forget_damaged("here", "toy")
    measure(store, force=True)
    assert store.read("here", "toy")["time_us"].tolist() == [3.0, 6.0, 9.0]


def test_equal_hardware_elsewhere_is_another_machine(store):
    here = this_machine()
    other = dataclasses.replace(here, identity="0" * 16)
    store.claim(other, here.name)
    assert store.folder_for(here) == "here"
    stranger = dataclasses.replace(here, identity="1" * 16)
    assert store.folder_for(stranger) == f"{here.name}-b"
    assert store.folder_for(stranger, here.name) == here.name
    with pytest.raises(ValueError, match=f"nowhere.*valid: auto.*{here.name}"):
        store.folder_for(stranger, "nowhere")


def toy_processes(store):
    """The supervisor, torchrun and the ranks, as long as they live: all are given a path below the study's root."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if any(part.startswith(f"{store.root}/") for part in process.info["cmdline"] or [])
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


RUN = """
import os, pathlib
from study.harness.machine import this_machine
from study.results import launch
from study.results.store import Store
from study.sections import registry as sections
from tests import toy
sections.SECTIONS["toy"] = toy.SECTION
store = Store(pathlib.Path(os.environ["MACO_ROOT"]))
launch.measure(store, "here", toy.DATASET, toy.ToyParameters(sizes=[1, 2, 3], seconds=1.6), this_machine(), toy.RATES)
"""


@pytest.mark.parametrize("victim", ["runner", "runner, interrupted", "rank"])
def test_nothing_survives_a_kill_and_the_next_run_resumes(store, tmp_path, victim):
    environment = {**os.environ, "MACO_ROOT": str(tmp_path), "PYTHONPATH": str(CHECKOUT)}
    # As from a terminal: what a script starts in the background ignores SIGINT, and so do its children.
    interruptible = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    runner = subprocess.Popen(
        [sys.executable, "-c", RUN], env=environment, cwd=CHECKOUT, stderr=subprocess.DEVNULL, preexec_fn=interruptible
    )
    journal = store.journal("here", "toy")
    deadline = time.monotonic() + 60
    while not journal.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert journal.exists(), "no point was finished"
    ranks = [process for process in toy_processes(store) if "torch.distributed.run" not in process.info["cmdline"]]
    assert len(ranks) == 2
    if victim == "rank":
        ranks[0].kill()
    else:
        runner.send_signal(signal.SIGKILL if victim == "runner" else signal.SIGINT)
    assert runner.wait(timeout=20) != 0
    deadline = time.monotonic() + 10
    while toy_processes(store) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not toy_processes(store)
    asked = measure(store, sizes=[1, 2, 3], seconds=1.6)
    assert 1 not in asked and 3 in asked, "the first point is kept, the last one is measured"
