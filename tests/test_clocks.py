"""The report's tables of SM clocks: what they say where clocks were measured, and where they were not."""

import dataclasses

import pytest
import stored

from study.report import clocks, figures, findings, report
from study.results import evidence

COLUMNS = ["clock_mhz", "matmul_clock_mhz", "compute_clock_mhz"]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "stale_tables", lambda *arguments: [])
    monkeypatch.setattr(figures, "write", lambda *arguments: [])
    return stored.study(tmp_path)


@pytest.fixture
def machine(store):
    return evidence.load(store, "h200-x2")[0]


def line(text: str, start: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(start)]
    return " ".join(found.split())


def without(machine, *columns: str):
    tables = {name: rows.drop(columns=[*columns], errors="ignore") for name, rows in machine.tables.items()}
    return dataclasses.replace(machine, tables=tables)


def test_the_fraction_at_equal_clock_stands_beside_the_one_in_time(machine, store):
    text = clocks.linear(machine)  # the matmul at 1500 MHz, the persistent kernel at 1440: 92 % · 1500 / 1440
    assert line(text, "| Qwen3-32B down_proj") == (
        "| Qwen3-32B down_proj | 1500 MHz | 1600 MHz | persistent kernel, 1440 MHz, -4.0% | 92.0% | **95.8%** |"
    )
    text = clocks.overlap(machine, store.root)
    assert line(text, "| Large compute, large comm").endswith("| two streams, 1470 MHz, -2.0% | 117.7% | **120.1%** |")
    assert line(text, "| Medium compute, large comm").endswith(f"| {clocks.COMM_LIMITS} |")


def test_how_much_of_what_is_missing_is_the_clock(machine, store):
    (sentence,) = clocks.told(machine)
    assert sentence == (
        "where the matmul limits, M ≥ 2048, 2 points, the persistent kernel runs at 96.0% of the clock of the matmul "
        "alone (median; 96%) and reaches 92.0% of the ideal; at equal clock it would be 95.8%: the clock is 48% of "
        "what is missing there"
    )
    assert any(sentence in found.lines for found in findings.take_home(machine, store.root))
    rows = machine.table("linear_all_reduce").assign(clock_mhz=1600.0)
    faster = dataclasses.replace(machine, tables={**machine.tables, "linear_all_reduce": rows})
    assert "96.0% of the clock" not in clocks.told(faster)[0] and "the clock is nothing" in clocks.told(faster)[0]


def test_tables_without_clocks_say_so(machine, store):
    bare = without(machine, *COLUMNS)
    assert clocks.told(bare) == []
    for make, *arguments in ((clocks.linear, bare), (clocks.overlap, bare, store.root)):
        with pytest.raises(evidence.Missing, match="the SM clock was not measured"):
            make(*arguments)
    found = findings.take_home(bare, store.root)
    assert len(found) == len(findings.take_home(machine, store.root)) and not any(
        "clock" in text for one in found for text in one.lines
    )
    rows = machine.table("linear_all_reduce")
    rows.loc[rows["layer"].eq("Qwen3-8B o_proj"), "clock_mhz"] = float("nan")
    partly = clocks.linear(dataclasses.replace(machine, tables={**machine.tables, "linear_all_reduce": rows}))
    assert line(partly, "| Qwen3-8B").count(clocks.NOT_MEASURED) == 3 and "95.8%" in line(partly, "| Qwen3-32B")


def test_the_report_shows_the_clocks_and_what_power_there_was(machine, store):
    assert report.build(store.root) == []
    text = (store.root / "REPORT.md").read_text()
    assert text.count("1440 MHz, -4.0%") == 2 and text.count("1470 MHz, -2.0%") == 4
    assert text.count("The driver did not tell the limit.") == 2
    launches = {"first": {"sampled": {"devices": [{"power_w": {"max": 702.71}}, {"power_w": {"max": 690.0}}]}}}
    told = dataclasses.replace(
        machine,
        description={**machine.description, "power_limit_w": 700.0, "max_sm_clock_mhz": 1980},
        records={**machine.records, "overlap": {"launches": launches}},
    )
    assert clocks.power(told, "overlap") == (
        "The limit is 700 W a GPU, the highest clock of its SMs 1980 MHz; "
        "up to 703 W were drawn while this section ran."
    )
