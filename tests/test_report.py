"""The report: numbers from data only, failures shown in place, verdicts that follow the data."""

import collections
import dataclasses
import sys
import types

import jinja2
import pandas as pd
import pytest
import stored

from study.claims import earlier
from study.claims import judge as claims
from study.harness.files import CHECKOUT
from study.published import tables as published
from study.report import (
    eager,
    figures,
    findings,
    ideal_findings,
    judgement_tables,
    planner,
    publish,
    report,
    report_tables,
    sharing,
    techniques,
    transfer,
    when_tables,
)
from study.results import evidence
from study.results.store import DataError
from study.sections import registry as sections


@pytest.fixture
def fresh(monkeypatch):
    """The made-up tables were not measured for any parameters: take them for fresh, and leave the figures undrawn."""
    monkeypatch.setattr(evidence, "stale_tables", lambda *arguments: [])
    monkeypatch.setattr(figures, "write", lambda *arguments: [])


def text_of(store, **options) -> str:
    report.build(store.root, **options)
    return (store.root / "REPORT.md").read_text()


def verdicts(store) -> dict[str, str]:
    machine, _ = evidence.load(store, "h200-x2")
    return {entry.id: entry.verdict for entry in claims.judge(machine, store.root)}


def test_the_report_sets_the_machine_beside_the_published_values(tmp_path, fresh):
    store = stored.study(tmp_path)
    assert report.build(tmp_path) == []
    text = text_of(store)
    assert "3.72 ms → 2.47 ms, 1.51x" in text
    assert "522 µs → 326 [323, 330] µs, **1.60×** [1.58, 1.62]" in text
    assert "560.44 ms, 57.1 tokens/sec, 1.0x" in text
    assert "figures/h200-x2/when_map.png" in text
    for section in ("## Test environment", "## 1. ", "## 2. ", "## 3. ", "## 4. ", "## Conclusion", "## Definitions"):
        assert section in text
    assert text_of(store) == text


def test_every_published_claim_has_a_judge():
    assert list(published.printed(CHECKOUT, "claims")["id"]) == list(claims.JUDGES)


def test_verdicts_follow_the_data(tmp_path, fresh):
    fast = verdicts(stored.study(tmp_path / "fast", speedup=1.6))
    slow = verdicts(stored.study(tmp_path / "slow", speedup=0.9))
    for claim in ("overlap_small", "overlap_large", "overlap_average", "overlap_worst"):
        assert (fast[claim], slow[claim]) == ("reproduced", "not reproduced")
    assert fast["inference_speedup"] == "reproduced"
    assert fast["bandwidth_nvlink"] == "not reproduced"
    assert fast["inference_paged_attention"] == "not testable here"


def test_more_of_a_gain_is_more_beyond_the_tolerance():
    these, those = (pd.DataFrame({"gain": [gain]}) for gain in (1.10, 1.08))
    assert not claims.gains_more(these, those)  # 2 % apart, which no prediction resolves
    assert claims.gains_more(these.assign(gain=1.14), those)


def test_a_ratio_below_the_printed_one_but_above_1_is_not_reproduced(tmp_path, fresh):
    found = verdicts(stored.study(tmp_path, speedup=1.3))
    assert found["overlap_large"] == "not reproduced"  # 1.51x is printed
    assert found["overlap_medium"] == "reproduced"  # 1.08x is printed


def test_other_sizes_make_the_published_configurations_not_testable(tmp_path, fresh):
    machine, _ = evidence.load(stored.study(tmp_path), "h200-x2")
    smaller = machine.table("overlap").assign(matmul_n=lambda rows: rows["matmul_n"] // 2)
    shrunk = dataclasses.replace(machine, tables={**machine.tables, "overlap": smaller})
    found = {entry.id: entry for entry in claims.judge(shrunk, tmp_path)}
    assert found["overlap_small"].verdict == "not testable here"
    assert "measured at other sizes here: 8388608 bytes and n = 512" in found["overlap_small"].numbers


def test_a_failed_section_shows_its_error_in_place(tmp_path, fresh):
    store = stored.study(tmp_path)
    stored.settle(store, "overlap", "failed", "rank 1 ran out of memory")
    text = text_of(store)
    section = text[text.index("## 1. ") : text.index("## 2. ")]
    assert "section overlap is FAILED.** rank 1 ran out of memory" in section
    assert "FAILED" not in text[text.index("## 2. ") : text.index("## 3. ")]
    summary = text[text.index("### Findings") : text.index("## 1. ")]
    assert summary.count("**h200-x2**") == summary.count("**h200-x2** (failed: overlap)") == 3


def test_a_stale_section_says_what_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "write", lambda *arguments: [])
    text = text_of(stored.study(tmp_path))
    assert "section overlap is STALE.** overlap: " in text
    summary = text[text.index("### Findings") : text.index("## 1. ")]
    names = "(stale: environment, overlap, "
    assert summary.count("**h200-x2**") == summary.count(f"**h200-x2** {names}") == 3


def test_what_is_computed_from_stale_data_says_so(tmp_path, fresh, monkeypatch):
    monkeypatch.setattr(
        evidence, "stale_tables", lambda store, name, section, *rest: ["old"] if section.name == "overlap" else []
    )
    text = text_of(stored.study(tmp_path))
    assert "> **h200-x2: section when_to_overlap rests on stale data**, of overlap (" in text
    assert "section bandwidth rests on" not in text


def test_a_section_measured_at_two_commits_says_which_table_is_of_which(tmp_path, fresh):
    def told(**commits: str) -> list[str]:
        launches = {table: {"table": table, "git": {"commit": commit * 40}} for table, commit in commits.items()}
        store.write_record("h200-x2", "overlap", {**record, "launches": launches})
        return [line for line in text_of(store).splitlines() if "at more than one commit" in line]

    store = stored.study(tmp_path)
    record = store.record("h200-x2", "overlap")
    assert told(overlap="a", overlap_timeline="a") == []
    (line,) = told(overlap="a", overlap_timeline="b")
    assert line == (
        "> h200-x2: section overlap was measured at more than one commit: overlap aaaaaaa; overlap_timeline bbbbbbb"
    )


def test_the_summary_sets_the_machines_side_by_side_and_folds_the_numbers(tmp_path, fresh):
    store = stored.study(tmp_path, speedup=1.6)
    machine, _ = evidence.load(store, "h200-x2")
    other = dataclasses.replace(machine, name="h100-x2", tables={}, reasons=collections.defaultdict(str))
    head, _, first, second = ideal_findings.overview([machine, other], tmp_path).splitlines()
    table = machine.table("overlap").query("protocol == 'device' and method == 'two_stream'").head(4)
    parts = (table["t_seq_us"] - table["t_overlap_us"]) / (table["t_seq_us"] - table["ideal_us"])
    assert first.startswith(f"| h200-x2 | {parts.min():.0%} to {parts.max():.0%} | ") and first.endswith(" | – | 92% |")
    assert second == "| h100-x2 | – | – | – | – |" and head.count("|") == 6
    text = text_of(store)
    summary = text[text.index("### Findings") : text.index("### What of")]
    folded = summary[summary.index("<details>") : summary.index("</details>")]
    assert (
        "Finding 1:\n\n- Small compute" in folded and "\n1. **" in summary and "- Small" not in summary.split("<det")[0]
    )
    lines = lines_with(techniques.two_streams([machine, machine], tmp_path, "device"), "Large compute, large comm")
    assert len(lines) == 2 and all("| h200-x2 |" in line and "of the ideal" not in line for line in lines)
    cut_off = evidence.SectionState("interrupted", "a run began and did not end")
    machine = dataclasses.replace(machine, sections={**machine.sections, "linear_all_reduce": cut_off})
    assert "% (interrupted) |" in ideal_findings.overview([machine], tmp_path)


def test_a_damaged_file_is_named_and_the_other_sections_go_on(tmp_path, fresh):
    store = stored.study(tmp_path)
    with open(store.data / "h200-x2" / "bandwidth.csv", "a") as file:
        file.write("edited by hand\n")
    problems = report.build(tmp_path)
    assert any("data/h200-x2/bandwidth.csv was changed after it was written" in problem for problem in problems)
    text = (tmp_path / "REPORT.md").read_text()
    assert "section bandwidth is FAILED.** data/h200-x2/bandwidth.csv was changed" in text
    assert "**1.60×**" in text
    assert verdicts(store)["bandwidth_8"] == "not testable here"


def test_no_machine_yet_is_a_report_too(tmp_path, fresh):
    store = stored.study(tmp_path)
    (store.data / "h200-x2" / "machine.json").unlink()
    assert "No machine has been measured yet" in text_of(store)


def test_a_name_the_template_does_not_know_is_an_error(tmp_path, fresh, monkeypatch):
    template = tmp_path / "broken.j2"
    template.write_text("{{ sumary }}")
    monkeypatch.setattr(report, "TEMPLATE", template)
    with pytest.raises(jinja2.UndefinedError, match="sumary"):
        report.build(stored.study(tmp_path / "study").root)


def test_the_template_holds_no_measured_number():
    text = report.TEMPLATE.read_text()
    for unit in (" ms", " µs", "GB/s", "TFLOP", "tokens/s", "×]", "1.22", "1.51", "5.87"):
        assert not any(character.isdigit() for line in text.splitlines() if unit in line
                       for character in line.split(unit)[0][-1:]), unit  # fmt: skip


def test_html_embeds_the_figures_and_the_pdf_is_set(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "stale_tables", lambda *arguments: [])
    pytest.importorskip("pypandoc")
    pytest.importorskip("typst")
    report.build(stored.study(tmp_path).root)
    assert [path.name for path in publish.build(tmp_path)] == ["REPORT.html", "REPORT.pdf"]
    html = (tmp_path / "REPORT.html").read_text()
    assert html.count('src="data:image/png;base64') == len(figures.FIGURES)
    assert (tmp_path / "REPORT.pdf").read_bytes().startswith(b"%PDF")


def test_without_pandoc_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pypandoc", None)
    assert publish.build(tmp_path) == []
    assert "pypandoc is not installed" in capsys.readouterr().out


def with_rows(machine, method, **values):
    """The machine as if it had also measured `method`: two streams' rows with `values` in place of theirs."""
    table = machine.table("overlap")
    more = table[table["method"] == "two_stream"].assign(method=method, **values)
    return dataclasses.replace(machine, tables={**machine.tables, "overlap": pd.concat([table, more])})


def test_findings_follow_the_data(tmp_path, fresh):
    machine, _ = evidence.load(stored.study(tmp_path), "h200-x2")
    ideal, linear, engine, last = findings.take_home(machine, tmp_path)
    assert linear.sentence == (
        "One kernel that multiplies and sums reaches 92% of the ideal at M ≥ 2048, 1.30–1.68× over sequential "
        "NCCL and 1.21–1.40× over the fastest peer; by the intervals it is ahead of every peer at 4 of 4 points"
    )
    assert linear.lines[-1].startswith("decoding, M ≤ 16, with residual and RMSNorm: ")
    assert (last.figure, last.decided) == ("overlap_synchronisation", False)  # 1.01× [1.00, 1.02]
    assert engine.sentence.startswith("vLLM's 16.13× (published 5.87×) comes to 67% from compilation and CUDA graphs")
    assert ideal.figure == "overlap_techniques"

    (tmp_path / "slow").mkdir()
    little, _ = evidence.load(stored.study(tmp_path / "slow", speedup=1.1), "h200-x2")
    found = findings.near_ideal(little, tmp_path)
    assert found.sentence == (
        "The only technique (two streams) reaches 65% to 96% of the ideal, 95% or more in 1 of 4 configurations, and "
        "22% to 73% of the ideal gain; it is furthest from the ideal in “Large compute, very large comm”"
    )
    why = "32 SMs 1.15×: its tiles come in whole waves, and without a few SMs it needs one wave more"
    assert found.lines[-1].startswith("why not in “Large compute, very large comm”") and why in found.lines[-1]
    assert sum(line.startswith("why not in") for line in found.lines) == 3  # each that falls short

    slow = {"speedup": 1.0, "speedup_lo": 0.99, "speedup_hi": 1.01}
    slower = with_rows(machine, "two_stream_matmul_first", **slow)
    assert "intervals part in 4 of 4 configurations" in findings.take_home(slower, tmp_path)[2].sentence
    same = with_rows(machine, "two_stream_matmul_first")
    found = findings.launch_order(same, tmp_path)
    assert not found.decided and "makes no difference" in found.sentence


def test_the_fraction_of_the_ideal_gain_follows_the_times_and_the_speedup(tmp_path, fresh):
    def gain(**values) -> str:
        row = {"t_seq_us": 200.0, "ideal_us": 100.0, "speedup_lo": 1.2, "speedup_hi": 1.3, "t_overlap_us": 160.0}
        return techniques.gain_percent(pd.Series({**row, **values}))

    assert gain() == "40.0% [33.3, 46.2]"  # 40 of 100 µs; 1.2× leaves 166.7 µs
    assert gain(t_overlap_us=220.0, speedup_lo=0.8, speedup_hi=1.0) == "-20.0% [-50.0, 0.0]"
    assert gain(t_overlap_us=100.0, speedup_lo=2.0, speedup_hi=2.0) == "100.0% [100.0, 100.0]"
    assert gain(ideal_us=200 / 1.05) != "–" and gain(ideal_us=200 / 1.04) == gain(ideal_us=200.0) == "–"

    machine, _ = evidence.load(stored.study(tmp_path, speedup=1.6), "h200-x2")
    table = machine.table("overlap")
    text = techniques.comparison(machine, tmp_path)
    for row in table[table["protocol"].eq("device") & table["method"].eq("two_stream")].head(4).itertuples():
        part = (row.t_seq_us - row.t_overlap_us) / (row.t_seq_us - row.ideal_us)
        assert lines_with(text, row.configuration, f"| {part:.1%} [")
    assert "fraction of the ideal gain** = (T_seq − T_overlap) / (T_seq − ideal)" in text_of(stored.Store(tmp_path))

    # A configuration with next to nothing to gain has no fraction of it, and the finding says that it is left out.
    little = table.assign(ideal_us=table["ideal_us"].where(table["matmul_n"] != 1024, table["t_seq_us"]))
    little = dataclasses.replace(machine, tables={**machine.tables, "overlap": little})
    assert lines_with(techniques.comparison(little, tmp_path), "Small compute", "fastest", "| – |")
    sentence = findings.near_ideal(little, tmp_path).sentence
    assert "of the ideal gain (not told in 1 of 4, where there is too little to gain)" in sentence
    unsure = dataclasses.replace(machine, tables={**machine.tables, "overlap": table.assign(speedup_lo=0.9)})
    assert "(the interval holds 0 in 4)" in findings.near_ideal(unsure, tmp_path).sentence


def test_a_fit_without_degrees_of_freedom_is_no_estimate(tmp_path, fresh):
    machine, _ = evidence.load(stored.study(tmp_path), "h200-x2")
    table = machine.table("when_to_overlap")
    few = table.head(4).assign(method="copy_engine_stream", num_training=3, held_out=[False] * 3 + [True], error=0.08)
    both = dataclasses.replace(machine, tables={**machine.tables, "when_to_overlap": pd.concat([few, table])})
    text = when_tables.prediction(both)
    full, exact = text.splitlines()[2:4]
    number = table["num_training"].iloc[0]
    assert full.startswith(f"| two streams | {number} | {number - 3} | ") and f" of {table['held_out'].sum()} |" in full
    assert exact.startswith("| copy engine on a stream | 3 | 0 | ")
    assert "no estimate; off by 8.0% | not testable" in exact and "no degree of freedom is left" in text
    assert "no degree of freedom" not in when_tables.prediction(machine)
    # Carried over to another machine are only fits that can be wrong.
    other = dataclasses.replace(both, name="h200-x4")
    assert "copy engine" not in when_tables.transfers([both, other])


def test_agreement_with_earlier_measurements(tmp_path, fresh):
    machine, _ = evidence.load(stored.study(tmp_path), "h200-x2")
    with pytest.raises(evidence.Missing, match="no earlier measurement of h200-x2 is on file"):
        earlier.compare(machine, tmp_path)
    configuration = "configuration=Large compute, large comm; protocol=device; method=two_stream"
    entries = [
        ("h200-x*", "environment", "value", "quantity=peer_read", "360", "380", "GB/s", "", ""),
        ("h200-x4", "environment", "value", "quantity=peer_read", "1", "1", "GB/s", "", ""),
        (
            "h200-x2",
            "bandwidth",
            "time_us",
            "collective=all_reduce; backend=nccl; bytes=8192",
            "30",
            "30",
            "µs",
            "",
            "",
        ),
        (
            "h200-x2",
            "bandwidth",
            "time_us",
            "collective=all_reduce; backend=nccl; bytes=67108864",
            "264",
            "264",
            "µs",
            "",
            "",
        ),
        ("h200-x2", "overlap", "t_overlap_us", configuration, "522", "522", "µs", "method=sequential", "one by one"),
    ]
    (tmp_path / "data" / "earlier").mkdir()
    rows = pd.DataFrame([(*entry, "a source") for entry in entries], columns=earlier.COLUMNS)
    rows.to_csv(tmp_path / "data" / "earlier" / "h200.csv", index=False)
    read, small, large, overlapped = earlier.compare(machine, tmp_path)
    assert [one.agrees for one in (read, small, large, overlapped)] == [True, False, True, False]
    assert read.why == "" and "agree at the largest size (1.00), so the link's rate is the same" in small.why
    assert overlapped.why == "one by one; our arm `sequential` does so: 522 µs, 1.00 of the earlier value, which agrees"
    text = text_of(stored.Store(tmp_path))
    assert "2 of 4 earlier values agree with ours within 10%. Measured earlier: a source.\n" in text
    # The same, measured earlier by another program as well: the two rows are told apart.
    again = rows.iloc[[2]].assign(low="16", high="16", source="another")
    pd.concat([rows, again]).to_csv(tmp_path / "data" / "earlier" / "h200.csv", index=False)
    text = judgement_tables.agreement(machine, tmp_path)
    assert "3 of 5 earlier values agree with ours within 10%. Measured earlier: (1) a source · (2) another.\n" in text
    assert lines_with(text, "nccl, 8192 bytes", "30 µs (1)") and lines_with(text, "nccl, 8192 bytes", "16 µs (2)")


def test_a_disagreement_that_our_launches_have_among_themselves_is_told_as_one():
    entry = types.SimpleNamespace(note="", otherwise="")
    one = earlier.Comparison("vllm", "inference", 0.0, 79.0, 63.0, 90.0, 60.0, 60.0, "ms", "", "a source")
    assert not one.agrees
    assert earlier.why(None, one, entry, []) == "our interval over all launches comes within 10% of it"
    wider, narrower = (dataclasses.replace(one, ours_lo=low) for low in (58.0, 70.0))
    assert earlier.why(None, wider, entry, []) == "the earlier value lies within our interval over all launches"
    assert earlier.why(None, narrower, entry, []) == "not known"


def test_the_model_of_one_machine_is_judged_on_another_of_its_kind(tmp_path, fresh):
    machine, _ = evidence.load(stored.study(tmp_path), "h200-x2")
    table = machine.table("when_to_overlap")
    slower = table.assign(measured_us=2 * table["measured_us"])
    other = dataclasses.replace(machine, name="h200-x4", tables={**machine.tables, "when_to_overlap": slower})
    processor = dataclasses.replace(machine, name="cpu-2", kind="cpu")
    machines = [machine, other, processor]
    assert [(one.name, two.name) for one, two in transfer.pairs(machines)] == [
        ("h200-x2", "h200-x4"),
        ("h200-x4", "h200-x2"),
    ]
    assert [one.name for one in transfer.alone(machines)] == ["cpu-2"]
    (found,) = transfer.judge(machine, other)
    assert (found.method, found.num_points) == ("two_stream", len(table))
    assert 0.3 < found.median_error < 0.7  # half of what was measured
    # However many machines: a row per judged one, a column per fit.
    third = dataclasses.replace(machine, name="h100-x2")
    text = when_tables.transfers([third, *machines])
    head, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert head.endswith("| fitted on h100-x2 | fitted on h200-x2 | fitted on h200-x4 |")
    assert [row.split("|")[1].strip() for row in rows] == ["h200-x2", "h200-x4", "h100-x2"]
    assert all(row.count("| – |") == 1 for row in rows)  # its own
    assert text.endswith("cpu-2 is the only machine of its kind (cpu) with this section measured, so its model is not "
                         "judged on another one.")  # fmt: skip


def test_minutes_are_those_of_the_launches(tmp_path, fresh):
    store = stored.study(tmp_path)
    record = store.record("h200-x2", "overlap")
    launches = {
        name: {"seconds": seconds, "git": {"commit": commit, "dirty": dirty}}
        for name, seconds, commit, dirty in (("a", 100.0, "acda2b9", None), ("b", 50.0, "0123456789abcdef", True))
    }
    store.write_record("h200-x2", "overlap", {**record, "launches": launches})
    line = next(line for line in text_of(store).splitlines() if line.startswith("| overlap_published"))
    assert line.split("|")[4].strip() == "2.5"
    assert "0123456 (modified), acda2b9" in text_of(store)


def test_the_report_tells_until_when_and_by_how_many_processes_each_table_was_measured(tmp_path, fresh):
    store = stored.study(tmp_path)
    record = store.record("h200-x2", "overlap")
    launches = {
        "a": {"table": "overlap", "time": "2026-11-22T23:50:00+00:00", "seconds": 900.0},
        "b": {"table": "sm_sharing", "time": "2026-11-22T23:58:00+00:00"},
        "c": {"table": "overlap", "time": "2026-11-22T23:40:00+00:00", "seconds": 60.0},
    }
    store.write_record("h200-x2", "overlap", {**record, "launches": launches})
    text = text_of(store)
    (line,) = lines_with(text, "| h200-x2 | overlap |")
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[5] == "2026-11-23 00:05" and cells[7] == "overlap 2, sm_sharing 1"
    assert lines_with(text, "| Measured (UTC) |", "2026-11-22 23:40 to 2026-11-23 00:05")
    (line,) = lines_with(text, "| h200-x2 | bandwidth |")
    assert [line.split("|")[place].strip() for place in (5, 7)] == ["", "–"]


def test_tables_are_not_padded_and_long_ones_fold():
    text = report_tables.table([["a", "b" * 90], ["c | d", "e"]], ["x", "y"])
    head, _, *rows = text.splitlines()
    assert head == "| x | y |" and rows == [f"| a | {'b' * 90} |", "| c \\| d | e |"]
    assert report_tables.folded("every row", text) == f"<details><summary>every row</summary>\n\n{text}\n\n</details>"
    assert report_tables.folded("every row", "*Not available on x: y*") == "*Not available on x: y*"


def test_what_is_folded_is_in_the_html_and_in_the_pdf(tmp_path):
    pypandoc = pytest.importorskip("pypandoc")
    text = report_tables.folded("every row", report_tables.table([["inside"]], ["column"]))
    for form, parts in (("html5", ("<details>", "<td>inside</td>", "</details>")), ("typst", ("[inside]",))):
        shown = pypandoc.convert_text(f"before\n\n{text}\n\nafter\n", form, format="gfm")
        assert all(part in shown for part in ("before", *parts, "after")), form


def test_launches_of_other_parameters_are_not_told(tmp_path, fresh):
    store = stored.study(tmp_path)
    _, table = sections.table("bandwidth")
    rows = store.read("h200-x2", "bandwidth")
    rows["point_key"] = [f"point {number}" for number in range(len(rows))]
    launches = rows.assign(repeat=0, launch=["asked", *["earlier"] * (len(rows) - 1)], method_version=2)
    store.write_table("h200-x2", table, rows.head(1), {"keys": ["point 0"]}, launches)
    record = store.record("h200-x2", "bandwidth")
    facts = {name: {"seconds": seconds} for name, seconds in (("asked", 60.0), ("earlier", 600.0))}
    store.write_record("h200-x2", "bandwidth", {**record, "launches": facts})
    machine, problems = evidence.load(store, "h200-x2")
    assert list(machine.records["bandwidth"]["launches"]) == ["asked"] and not problems
    assert machine.sections["bandwidth"].seconds == 60.0


def lines_with(text: str, *parts: str) -> list[str]:
    return [line for line in text.splitlines() if all(part in line for part in parts)]


def test_targets_are_judged_by_what_was_measured(tmp_path, fresh):
    machine, _ = evidence.load(stored.study(tmp_path, speedup=0.9), "h200-x2")
    ideal = machine.table("overlap").query("method == 'two_stream'")["ideal_us"]
    near = {f"t_overlap{end}_us": ideal * wide for end, wide in (("", 1.02), ("_lo", 1.01), ("_hi", 1.03))}
    better = with_rows(machine, "maco_push_64_stream", **near, speedup=1.7, num_launches=3)
    met = techniques.targets(better, tmp_path)
    (line,) = lines_with(met, "Large compute, large comm")
    assert [cell.strip() for cell in line.split("|")[2:-1]] == [
        "≥ 95%", "98.0% [97.1, 99.0]", "**met**", "–", "not measured"
    ]  # fmt: skip
    assert lines_with(met, "mean speedup", "≥ 1.65×", "1.70×", "**met**", "0 of 4 configurations")
    assert lines_with(met, "32 MiB, busbw", "≥ 330 GB/s", "239 [235, 244] GB/s, NCCL", "**not met** (2 of 3 launches)")
    assert lines_with(met, "8 KiB, time", "≤ 8 µs", "16 [15.7, 16.4] µs", "**not met**")
    comparison = techniques.comparison(better, tmp_path)
    assert lines_with(comparison, "Small compute", "fastest: push, 64 CTAs", "**1.70×**", "98.0% [97.1, 99.0] of 42 µs")
    assert len(lines_with(comparison, "planner: not measured")) == 4

    slow = machine.table("overlap").assign(num_ranks=3)
    three = dataclasses.replace(machine, tables={**machine.tables, "overlap": slow})
    with pytest.raises(evidence.Missing, match="targets are set for 2 and 4 GPUs, not for 3 GPUs"):
        techniques.targets(three, tmp_path)


def test_the_planner_is_judged_at_every_point_and_its_exceptions_are_listed(tmp_path, fresh):
    machine, _ = evidence.load(stored.study(tmp_path), "h200-x2")
    as_good = with_rows(machine, "auto", plan="nccl, overlapped")
    text = planner.judgement(as_good)
    assert "Of 16 points" in text and "in 16; slower by more than that, beyond noise, in 0." in text
    assert "`nccl, overlapped` 16×" in text
    assert "exceptions" not in text

    table = as_good.table("overlap")
    here = table["method"].eq("auto") & table["comm_bytes"].eq(16 * stored.MIB) & table["matmul_n"].eq(2048)
    noisy = table["method"].eq("auto") & table["comm_bytes"].eq(4 * stored.MIB)
    times = [name for name in table if name.startswith("t_overlap")]
    table = table.reset_index(drop=True)
    here, noisy = here.to_numpy(), noisy.to_numpy()
    table.loc[here, times] *= 1.8
    table.loc[noisy, ["t_overlap_us", "t_overlap_hi_us"]] *= 1.05
    worse = dataclasses.replace(machine, tables={**machine.tables, "overlap": table})
    text = planner.judgement(worse)
    assert "in 12; in 3 more, where the loss is up to 5.0%, the intervals leave that undecided; slower by" in text
    assert "slower by more than that, beyond noise, in 1." in text
    assert "slower beyond noise in 1 (16 MiB, n = 2048: 12.5%)" in text
    assert lines_with(text, "16 MiB, n = 2048", "`nccl, overlapped`", "80.0%", "two streams")


def test_what_sms_cost_is_told_from_the_table_and_its_absence_too(tmp_path, fresh):
    store = stored.study(tmp_path)
    machine, _ = evidence.load(store, "h200-x2")
    text = sharing.told(machine)
    assert lines_with(text, "| 4 ", "40% (4 µs of 10 µs); held for 100%: 1.15×", "40% (80 µs of 200 µs)")
    for way in ("cuBLAS told to leave them", "torch's carve-out"):
        assert f"{way}: n = 1024: 4 taken 1.10×, 32 taken 1.10×" in text
    assert "green context: RuntimeError: no green contexts here" in text
    assert "the planner was not measured on h200-x2" in text_of(store)

    record = store.record("h200-x2", "overlap")
    del record["tables"]["sm_sharing"]
    store.write_record("h200-x2", "overlap", record)
    assert report.build(tmp_path) == []
    text = text_of(store)
    assert "section overlap was run without the table sm_sharing" in text and "overlap_sm_sharing.png" not in text


def test_eager_code_is_told_beside_graphs_and_its_absence_too(tmp_path, fresh):
    store = stored.study(tmp_path)
    machine, _ = evidence.load(store, "h200-x2")
    text = eager.told(machine)
    assert "1.60× with the all-reduce on the side stream (geometric mean of 4; at most 1.60×: two streams in" in text
    assert "1.00× with the matmul on the side stream" in text
    assert "gains 1.80× there" in text and "late" not in text
    assert lines_with(text, "| two streams ", "200 µs, 1.50× → 320 µs, 0.94×")
    assert lines_with(text, "| two streams, leading ", "200 µs, 1.50× → 200 µs, 1.50×")

    rows = machine.table("overlap_eager").reset_index(drop=True)
    failed = rows["method"].eq("two_stream") & rows["launched"].eq("graph") & rows["leads"]
    rows.loc[failed, ["t_overlap_us", "speedup", "late_part"]] = float("nan")
    rows.loc[failed, "error"] = "no graph"
    rows.loc[rows["method"].eq("auto") & rows["launched"].eq("eager"), "late_part"] = 0.5

    def of(table) -> str:
        return eager.told(dataclasses.replace(machine, tables={**machine.tables, "overlap_eager": table}))

    text = of(rows)
    assert "the matmul on the side stream" not in text and lines_with(text, ", leading ", "failed: no graph → 200")
    assert "In 4 of 28 rows the host issued more than 5% of the samples late (up to 50%)" in text
    plain = "Two streams gain 0.94× there over sequential code, which is eager too, and 1.50× leading."
    assert plain in eager.told(machine)
    assert "Two streams gain" not in of(rows[~(rows["method"].eq("two_stream") & rows["leads"])])
    text = of(rows[rows["launched"] == "eager"])
    assert "Nothing is captured" in text and lines_with(text, "| sequential ", "| 300 µs ")

    record = store.record("h200-x2", "overlap")
    del record["tables"]["overlap_eager"]
    store.write_record("h200-x2", "overlap", record)
    assert report.build(tmp_path) == []
    assert "section overlap was run without the table overlap_eager" in text_of(store)


def test_the_report_says_how_many_runs_a_replay_held():
    class Stored:
        def samples(self, machine_name: str, table: str) -> pd.DataFrame:
            if table != "overlap":
                raise DataError(f"{table} has none")
            arms = [("nccl", "graph", "2"), ("nccl", "graph", "2"), ("push", "graph", "8"), ("eager", "backlog", "32")]
            same = {"point_key": "a", "launch": "b"}
            rows = [{**same, "label_arm": arm, "label_timing": how, "label_repeats": runs} for arm, how, runs in arms]
            others = {**rows[0], "point_key": "of other parameters", "label_repeats": "16"}
            return pd.DataFrame([*rows, {**rows[0], "launch": "c", "label_repeats": "1"}, others])

    records = {section: {"tables": {section: {"keys": ["a"]}}} for section in ("overlap", "bandwidth")}
    machine = types.SimpleNamespace(name="h200-x2", records=records)
    assert report.runs_in_a_replay(Stored(), machine, "overlap") == "1, 2, 8"
    assert report.runs_in_a_replay(Stored(), machine, "bandwidth") == "–"
    assert "the median and the most over all arms: h200-x2 1, 2, 8." in report.replays(Stored(), [machine], "overlap")
    assert report.replays(Stored(), [machine], "bandwidth") == ""
