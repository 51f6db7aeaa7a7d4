"""Every notebook shows the stored results of every machine in data/, on a host that can measure none of them."""

import dataclasses
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import IPython.display
import pandas as pd
import pytest

from study.commands import notebook
from study.harness import rates
from study.harness.files import CHECKOUT
from study.harness.machine import this_machine
from study.report import figures
from study.results import evidence
from study.results.store import Store
from study.sections.registry import SECTIONS
from tests import toy

MACHINES = Store(CHECKOUT).machines()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """What is committed in data/ and, as images, in figures/."""
    root = tmp_path_factory.mktemp("stored")
    shutil.copytree(CHECKOUT / "data", root / "data", ignore=shutil.ignore_patterns("executed", ".journal"))
    others = shutil.ignore_patterns("*.svg", "*.pdf", "*.csv")
    shutil.copytree(CHECKOUT / "figures", root / "figures", ignore=others)
    return Store(root)


@pytest.fixture
def shown(stored, monkeypatch):
    """What a notebook displays on a host of which nothing is stored."""
    found = []
    elsewhere = dataclasses.replace(this_machine(), kind="cpu", name="cpu-3", num_devices=3, identity="f" * 16)
    monkeypatch.setenv("MACO_ROOT", str(stored.root))
    monkeypatch.setattr(notebook, "this_machine", lambda: elsewhere)
    monkeypatch.setattr(notebook, "display", found.append)
    return found


def cells(name: str) -> list[str]:
    """The code cells of a notebook."""
    contents = json.loads((CHECKOUT / "notebooks" / name).read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in contents["cells"] if cell["cell_type"] == "code"]


def execute(name: str, shown: list, **parameters) -> None:
    """Run a notebook's code cells, `parameters` in place of those of its first one."""
    scope = {"display": shown.append}
    first, *rest = cells(name)
    exec(first, scope)
    scope.update(parameters)
    for source in rest:
        exec(source, scope)


def told(shown: list) -> str:
    return "\n".join(entry.data for entry in shown if isinstance(entry, IPython.display.Markdown))


def files(root: pathlib.Path) -> dict[pathlib.Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("section", SECTIONS.values(), ids=lambda section: section.name)
def test_a_notebook_shows_what_is_stored_of_a_machine(stored, shown, capsys, section, machine):
    before = files(stored.root)
    execute(section.notebook, shown, machine=machine)
    record = stored.record(machine, section.name)
    folder = machine if record else notebook.reference_for(stored, section.tables[0])
    instead = f"This section was never run on `{machine}`; `{folder}` is shown instead"
    assert (instead in told(shown)) == (not record)
    assert f"**{section.title}** on `{folder}` (stored results" in told(shown)
    images = [entry for entry in shown if isinstance(entry, IPython.display.Image)]
    assert images, "no figure was shown"
    record = stored.record(folder, section.name)
    state = evidence.state_of(stored, folder, section, stored.measured_machine(folder), record)
    assert state.state != "missing"
    said = f"{state.state}: {state.error}" if state.state == "stale" else state.state
    printed = capsys.readouterr().out
    assert f"section {section.name} of {folder} is {said}" in printed
    assert f"Nothing is measured: {folder} is another host's." in printed
    assert (f"(stored results; {said})" in told(shown)) == (state.state == "stale")
    assert files(stored.root) == before, "showing changes nothing"


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS.values(), ids=lambda section: section.name)
def test_papermill_shows_every_stored_machine(stored, tmp_path, section):
    """As `jupyter` would, from nothing: figures, no error, and within 20 s of one core's time."""
    environment = {**os.environ, "MACO_ROOT": str(stored.root), "PYTHONPATH": str(CHECKOUT)}
    for machine in MACHINES:
        before, output = resource.getrusage(resource.RUSAGE_CHILDREN), tmp_path / f"{machine}.ipynb"
        command = [sys.executable, "-m", "study.commands.execute", f"notebooks/{section.notebook}", str(output)]
        command.append(json.dumps({"machine": machine}))
        done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20, machine
        cells = json.loads(output.read_text(encoding="utf-8"))["cells"]
        outputs = [found for cell in cells for found in cell.get("outputs", [])]
        assert any("image/png" in found.get("data", {}) for found in outputs), machine
        assert not any(found["output_type"] == "error" for found in outputs), machine


def test_a_figure_that_cannot_be_drawn_ends_only_itself(stored, shown, monkeypatch, tmp_path):
    def fail(*arguments):
        raise TypeError("'**x**.y' <b> is not iterable")

    name = "bandwidth_busbw"
    monkeypatch.setitem(figures.FIGURES, name, dataclasses.replace(figures.FIGURES[name], draw=fail))
    copy = tmp_path / "study"
    shutil.copytree(stored.data, copy / "data")
    monkeypatch.setenv("MACO_ROOT", str(copy))
    execute("03_bandwidth.ipynb", shown, machine="cpu-2")
    assert f"figure {name} of cpu-2 could not be drawn: TypeError: '\\*\\*x\\*\\*.y' &lt;b&gt; is not" in told(shown)
    assert sum(isinstance(entry, IPython.display.Image) for entry in shown) == 1


def test_a_section_whose_figure_cannot_be_drawn_is_not_complete(stored, shown, monkeypatch, tmp_path):
    copy = Store(tmp_path / "study")
    shutil.copytree(stored.data, copy.data)
    here = dataclasses.replace(copy.measured_machine("cpu-2"), identity=copy.machine("cpu-2")["identities"][0])
    monkeypatch.setenv("MACO_ROOT", str(copy.root))
    monkeypatch.setattr(notebook, "this_machine", lambda: here)
    monkeypatch.setattr(rates, "measure", lambda machine, environment, num_ranks: toy.RATES)
    monkeypatch.setattr(figures.style, "rendered", lambda figure, data: [][0])
    run = notebook.begin("environment")
    run.figure("environment_ceilings")
    with pytest.raises(RuntimeError, match="environment_ceilings of cpu-2 could not be drawn: IndexError"):
        run.complete()


def test_equal_hardware_of_another_host_is_shown_and_left_alone(stored, shown, monkeypatch):
    elsewhere = dataclasses.replace(stored.measured_machine("cpu-2"), identity="f" * 16)
    monkeypatch.setattr(notebook, "this_machine", lambda: elsewhere)
    before = files(stored.root)
    execute("03_bandwidth.ipynb", shown, machine="cpu-2")
    assert "on `cpu-2` (stored results" in told(shown)
    assert files(stored.root) == before, "neither claimed nor measured"
    entry = stored.machine("cpu-2")
    monkeypatch.setenv("MACO_RUN_ID", "a run's")
    assert not notebook.is_shown(entry, elsewhere), "./run_all.sh --machine cpu-2 goes on in it"
    assert notebook.is_shown(stored.machine("h200-x2"), elsewhere)
    monkeypatch.delenv("MACO_RUN_ID")
    own = dataclasses.replace(elsewhere, identity=entry["identities"][0])
    assert not notebook.is_shown(entry, own), "its own host measures what is missing"
    one_core = dataclasses.replace(own, name="cpu-1", num_devices=1)
    assert notebook.is_shown(entry, one_core), "and not with fewer cores than it was measured with"


def test_what_failed_is_told_with_its_whole_error(shown):
    notebook.begin("bandwidth", machine="h200-x2")  # what it sets
    error = "NCCL: " + "a long reason, " * 20 + "read to its end"
    rows = pd.DataFrame({"backend": ["gloo", "nccl"], "correct": [True, False], "error": ["", error]})
    failed = notebook.failures(rows, "backend")
    assert error in failed._repr_html_() and "gloo" not in failed._repr_html_()
    assert notebook.failures(rows[rows["correct"]], "backend").data == "*Every arm passed its check.*"


def test_the_machines_that_can_be_shown_are_named(stored, shown):
    refused = f"'nope' is not one .*auto, cpu-3; stored, to look at .*: {', '.join(MACHINES)}$"
    with pytest.raises(ValueError, match=refused):
        notebook.begin("overlap", machine="nope")
