"""Any section alone, or none: report and figures of a machine that has nothing else stored."""

import shutil

import pytest

from study.drawing import style
from study.harness.files import CHECKOUT
from study.report import figures, report
from study.results import evidence
from study.results.store import TABLE_SUFFIXES, Store
from study.sections.registry import SECTIONS

# What is computed is stale without the tables it was computed from; its figures are drawn all the same.
COMPUTED = {"when_to_overlap"}


def alone(root, machine: str, *chosen: str) -> Store:
    """A study below `root` with only these sections of a stored machine."""
    store, source = Store(root), Store(CHECKOUT)
    for folder in ("published", "earlier"):
        shutil.copytree(source.data / folder, store.data / folder)
    (store.data / machine).mkdir()
    names = ["machine.json"]
    for section in map(SECTIONS.get, chosen):
        names += [
            f"{section.name}.json",
            *(f"{table}{suffix}" for table in section.tables for suffix in TABLE_SUFFIXES),
        ]
    for name in names:
        if (source.data / machine / name).exists():
            shutil.copy(source.data / machine / name, store.data / machine / name)
    return store


@pytest.fixture
def drawn(monkeypatch):
    """The figures drawn, which are not rendered: that is most of the time and the same for all."""
    kept = []
    monkeypatch.setattr(style, "rendered", lambda figure, data: kept.append(data) or dict.fromkeys(style.FORMATS, b""))
    return kept


@pytest.mark.parametrize("section", [*SECTIONS, None])
@pytest.mark.parametrize("machine", ["cpu-2", "h200-x2"])
def test_a_section_alone_has_its_figures_and_its_part_of_the_report(tmp_path, drawn, machine, section, capsys):
    store = alone(tmp_path, machine, *[section] if section else [])
    problems = report.build(store.root)
    assert f"{machine}: {len(drawn)} figures drawn\n" in capsys.readouterr().out, "told machine by machine"
    assert all(section == "when_to_overlap" and "is missing" in problem for problem in problems), problems
    text = (store.root / "REPORT.md").read_text(encoding="utf-8")
    for name, spec in figures.FIGURES.items():
        stored = spec.section == section and all(
            (store.data / machine / f"{table}.csv").exists() for table in spec.tables if "." not in table
        )
        assert (f"![{name}, {machine}](figures/{machine}/{name}.png)" in text) == stored, name
        assert (store.figures / machine / f"{name}.png").exists() == stored
    machine_of, _ = evidence.load(store, machine)
    state = "missing" if section is None else "failed" if section in COMPUTED else "complete"
    assert section is None or machine_of.sections[section].state == state
    assert text.count("is MISSING") == len(SECTIONS) - (section is not None)


def test_what_fails_ends_only_itself(tmp_path, drawn, monkeypatch):
    def fail(*arguments):
        raise TypeError("'numpy.float64' object is not iterable")

    store = alone(tmp_path, "cpu-2", "bandwidth")
    name = "bandwidth_published"
    monkeypatch.setitem(figures.FIGURES, name, figures.FigureSpec(name, "bandwidth", ("bandwidth",), "", fail))
    monkeypatch.setattr(report.report_tables, "bandwidth_best", fail)
    problems = report.build(store.root)
    text = (store.root / "REPORT.md").read_text(encoding="utf-8")
    told = f"figure {name} of cpu-2 could not be drawn: TypeError: 'numpy.float64' object is not iterable"
    assert told in problems and f"*Not drawn: {told}*" in text
    assert any("fail failed: TypeError: 'numpy" in problem for problem in problems) and len(problems) == 2
    assert "fail failed: TypeError: 'numpy.float64' object is not iterable*" in text
    assert "![bandwidth_busbw, cpu-2]" in text
