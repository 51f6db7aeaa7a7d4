"""Section 5: what it asks for, that a wrong or missing method is reported and never timed, what its report judges."""

import dataclasses
import os
import pathlib
import types

import numpy as np
import pandas as pd
import pytest
import stored
import torch
import torch.distributed as dist
from ranks import run_ranks

from maco_lib import comm
from maco_lib.kernels.decode_tiles import MAX_ROWS
from maco_lib.linear.techniques.persistent_time import HOP_US, NORM, PersistentTime, fastest_tiling, side_by_side
from maco_lib.overlap import LinearPlan
from study.drawing import looks, style
from study.harness.machine import Machine
from study.harness.spec import check_rows
from study.report import figures, linear, linear_findings, linear_persistent, report
from study.report import linear_targets as linear_promises
from study.results import evidence
from study.sections.linear_all_reduce.methods import (
    BASE,
    CHAIN,
    FEW_ROWS_METHODS,
    IDEAL_BACKENDS,
    LAYERS,
    MATMUL,
    METHODS,
)
from study.sections.linear_all_reduce.section import ENDURANCE, LINEAR, SECTION, TIMELINE

CPU = Machine("cpu", 2, "cpu-2", "0" * 16, 24 * 2**30, {})
GPUS = Machine("cuda", 4, "h200-x4", "0" * 16, 140 * 2**30, {})


def points(dataset, profile: str, machine: Machine, **given) -> list[dict]:
    return dataset.points(SECTION.resolve(profile, machine, given), machine)


def test_the_full_study_asks_for_every_layer_and_peer():
    asked = points(LINEAR, "full", GPUS)
    assert LAYERS["Qwen3-32B down_proj"] == (5120, 25600) and LAYERS["Llama-70B-like o_proj"] == (8192, 8192)
    assert {(point["layer"], point["n"], point["k"]) for point in asked} == {
        (layer, *shape) for layer, shape in LAYERS.items()
    }
    assert (min(point["m"] for point in asked), max(point["m"] for point in asked)) == (1, 16384)
    for point in asked:
        names = point["methods"].split(",")
        assert {BASE["cuda"], "sequential_two_shot", "auto"} <= set(names)
        assert ("decode" in names) == (point["m"] <= MAX_ROWS)
        assert ("persistent" in names) == (point["m"] > MAX_ROWS)
        if point["m"] <= 256:
            assert {BASE["cuda"], "sequential_vllm_custom", "auto"} <= set(point["chain_methods"].split(","))
        else:
            assert {"chunked2_nccl", "async_tp", "persistent"} <= set(names) and not point["chain_methods"]


def test_every_technique_stands_repeats_on_both_layers_with_as_many_rows_as_it_is_for():
    asked = points(ENDURANCE, "full", GPUS)
    named = [METHODS[MATMUL][point["method"]] for point in asked if point["method"] in METHODS[MATMUL]]
    techniques = {method.plan.get("technique") for method in named}
    assert {"sequential", "chunked", "persistent", "decode"} <= techniques
    rows = {(point["layer"], point["method"]): point["m"] for point in asked}
    for layer in ("Qwen3-8B o_proj", "Qwen3-32B down_proj"):
        most = [rows[layer, method] for method in ("persistent", "decode", "fused_norm")]
        assert most == [1024, MAX_ROWS, 256]
    one = points(ENDURANCE, "full", GPUS, endurance_layers=[], endurance_rows=16)
    assert {(point["layer"], point["m"]) for point in one} == {("Qwen3-8B o_proj", 16)}


def test_a_layer_that_fails_its_repeats_is_named():
    rows = stored.linear_endurance().assign(correct=True)
    other = rows.assign(layer="Qwen3-32B down_proj", num_identical=[999, 1000])
    state = {"sections": {}, "versions": {}, "records": {}, "reasons": {}}
    tables = {"linear_endurance": pd.concat([other, rows])}
    machine = evidence.Evidence("h200-x2", "2x NVIDIA H200", "cuda", {}, tables=tables, **state)
    (repeats, _) = linear_promises.endurance(machine)
    assert repeats.exceptions() == "Qwen3-32B down_proj, persistent kernel: 99.9%"


def test_at_few_rows_the_ideal_counts_every_all_reduce_that_is_an_arm():
    for kind, (_, alone) in IDEAL_BACKENDS.items():
        arms = {METHODS[MATMUL][name].backend for name in FEW_ROWS_METHODS[kind]}
        assert arms - {""} <= set(alone), kind


def test_every_method_has_a_colour_and_a_marker():
    for names in METHODS.values():
        assert all(looks.look(name).label for name in names)
        assert all(method.is_peer == name.startswith(("sequential_nccl", "sequential_gloo", "sequential_one", "async"))
                   or method.is_peer == (method.how == "in_place" or method.backend == "nccl")
                   for name, method in names.items())  # fmt: skip


@pytest.mark.parametrize(
    ("dataset", "given", "message"),
    [
        (LINEAR, {"layers": ["Qwen4 o_proj"]}, "'Qwen4 o_proj'.*Qwen3-8B o_proj"),
        (LINEAR, {"rows": [0]}, "rows = 0"),
        (LINEAR, {"rows": [2**30]}, "Qwen3-8B o_proj with 1073741824 rows needs"),
        (LINEAR, {"shrink": 4096}, "shrink = 4096 leaves"),
        (LINEAR, {"methods": ["telepathy"]}, "'telepathy'.*persistent"),
        (LINEAR, {"chain_methods": ["fused_norm", "fused_norm"]}, "each is named once"),
        (ENDURANCE, {"endurance_methods": ["sequential_gloo"]}, "sequential_gloo sums in memory of one shape"),
    ],
)
def test_what_cannot_be_is_refused_by_name(dataset, given, message):
    with pytest.raises(ValueError, match=message):
        points(dataset, "smoke", CPU, **given)


def measure_everything(rank: int, num_ranks: int) -> None:
    from study.harness.worker import Context
    from study.sections.linear_all_reduce import arms
    from study.sections.linear_all_reduce import measure as program
    from study.sections.linear_all_reduce import measure_endurance as endurance
    from study.sections.linear_all_reduce import measure_timeline as timeline

    events = pathlib.Path(os.environ["MACO_CACHE"], "events.jsonl")
    context = Context(rank, num_ranks, torch.device("cpu"), dist.group.WORLD, events)
    shape = {"layer": "Qwen3-8B o_proj", "n": 96, "k": 64, "dtype": "bf16"}

    def measure(m: int, methods: str, chain_methods: str = "") -> pd.DataFrame:
        point = {**shape, "m": m, "methods": methods, "chain_methods": chain_methods}
        rows = program.measure({**point, "budget_s": 0.01, "min_iterations": 5}, context).rows
        table = pd.DataFrame(rows).assign(point_key="k", num_launches=1)
        check_rows(LINEAR, table, "test")
        return table.set_index(["operation", "method"])

    few = measure(3, "sequential_gloo,sequential_two_shot", "sequential_gloo")
    assert few.loc[(MATMUL, "sequential_gloo"), "correct"] and few.loc[(CHAIN, "sequential_gloo"), "correct"]
    two_shot = few.loc[(MATMUL, "sequential_two_shot")]
    assert not two_shot["correct"] and "GPUs" in two_shot["error"] and np.isnan(two_shot["time_us"])
    many = measure(300, "sequential_gloo,chunked2_gloo,auto_untuned,auto").loc[MATMUL]
    plans = {"sequential:gloo", *(f"chunked:{number}:gloo" for number in (2, 3))}
    assert {many.loc["auto_untuned", "plan"], many.loc["auto", "plan"]} <= plans and many["correct"].all()
    chunked = many.loc["chunked2_gloo"]
    assert chunked["plan"] == "chunked:2:gloo" and chunked["equal_on_ranks"]
    assert 0 < chunked["relative_error"] <= 1.2 * chunked["base_error"] < 0.01
    assert chunked["ideal_us"] == max(chunked["t_matmul_us"], chunked["t_comm_us"])
    assert chunked["ect_us"] == pytest.approx(chunked["time_us"] - chunked["t_matmul_us"])
    assert chunked["t_matmul_chunked_us"] > 0 and np.isnan(many.loc["sequential_gloo", "t_matmul_chunked_us"])

    good = arms.WAYS["plan"]

    def spoiled(problem, method):
        run = good(problem, method)

        def wrong(number: int):
            (result,) = run(number)
            result[299, 5] += 0.5 * (rank == 1)
            return (result,)

        return wrong

    def stale(problem, method):
        """Writes nothing the second time: what the first left lies there."""
        run, kept = good(problem, method), []

        def once(number: int):
            kept[:] = kept or [run(number)]
            return kept[0]

        return once

    def lagging(num_right: int):
        """Right so many times, then what the run before would give."""

        def way(problem, method):
            run, results = good(problem, method), []

            def late(number: int):
                results.append(tuple(output.clone() for output in run(number)))
                return results[-1 if len(results) <= num_right else -2]

            return late

        return way

    # The last while it is judged, and wrong from then on.
    wrongs = ((spoiled, "rank 1: 1 of 28800 elements are wrong, the first at (299, 5)"),
              (stale, "rank 0: 28"), (lagging(2), "rank 0: timed: 28"))  # fmt: skip
    for broken, message in wrongs:
        arms.WAYS["plan"] = broken
        wrong = measure(300, "sequential_gloo,chunked2_gloo").loc[(MATMUL, "chunked2_gloo")]
        assert not wrong["correct"] and wrong["error"].startswith(message), wrong["error"]
        assert np.isnan(wrong["time_us"])
    arms.WAYS["plan"] = good

    point = {**shape, "m": 300, "methods": "sequential_gloo,chunked2_gloo,persistent"}
    table = pd.DataFrame(timeline.measure(point, context).rows).assign(point_key="k", num_launches=1)
    check_rows(TIMELINE, table, "test")
    assert set(table.loc[table["correct"], "method"]) == {"sequential_gloo", "chunked2_gloo"}
    point = {**shape, "m": 300, "method": "chunked2_gloo", "num_repeats": 7, "num_calls": 50}
    table = pd.DataFrame(endurance.measure(point, context).rows).assign(point_key="k", num_launches=1)
    check_rows(ENDURANCE, table, "test")
    assert table["num_identical"].tolist() == [7]

    arms.WAYS["plan"] = lagging(4)  # right while it is judged and for the first of each data
    (late,) = endurance.measure(point, context).rows
    assert late["correct"] and late["num_identical"] == 0
    arms.WAYS["plan"] = good


def test_rows_are_whole_and_a_wrong_method_is_never_timed(tmp_path, monkeypatch):
    monkeypatch.setenv("MACO_CACHE", str(tmp_path))
    run_ranks(measure_everything)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "stale_tables", lambda *arguments: [])
    monkeypatch.setattr(figures, "write", lambda *arguments: [])
    return evidence.load(stored.study(tmp_path), "h200-x2")[0]


def with_table(machine, rows: pd.DataFrame):
    _, table = stored.sections.table("linear_all_reduce")
    return dataclasses.replace(machine, tables={**machine.tables, "linear_all_reduce": stored.completed(table, rows)})


def test_a_row_tells_the_tiles_of_its_plan():
    from study.sections.linear_all_reduce import measure as program

    problem = types.SimpleNamespace(m=4096, n=5120, x=torch.empty(1, 6400), num_sms=132, context=None)
    problem.context = types.SimpleNamespace(num_ranks=4)
    told = [program.tiling(problem, str(plan)) for plan in (
        LinearPlan("persistent", tiling="2x96"), LinearPlan("persistent"), LinearPlan(), LinearPlan("decode"),
    )]  # fmt: skip
    assert told == ["2x96", str(fastest_tiling(4096, 5120, 6400, 4, 66)), "", ""]


def test_a_retired_technique_is_a_name_that_stored_parameters_may_hold_and_nothing_runs():
    from study.sections.linear_all_reduce import arms

    (point,) = points(LINEAR, "full", GPUS, methods=["sequential_nccl", "signalled"], layers=["Qwen3-8B o_proj"],
                      rows=[4096])  # fmt: skip
    assert point["methods"] == "sequential_nccl,signalled" and looks.look("signalled").label
    assert all("signalled" not in point["methods"].split(",") for point in points(LINEAR, "full", GPUS))
    with pytest.raises(ValueError, match="no such technique.*docs/tried.md"):
        arms.run_of(None, MATMUL, "signalled")


def verdicts(machine) -> dict[str, str]:
    return {one.label: one.row(3)[-1] for one in linear_promises.criteria(machine)}


def test_promises_are_judged_by_the_worst_point(machine):
    kept = verdicts(with_table(machine, stored.linear_all_reduce(fraction=0.92, ours=1.2)))
    # The example's async-TP finished nowhere: it is said that there is no comparison with it.
    assert set(kept.values()) == {"**met**", "**met**; without torch async-TP, not measured"}
    assert kept["M ≤ 256, chain: sequential NCCL over planner"] == "**met**"
    broken = verdicts(with_table(machine, stored.linear_all_reduce(fraction=0.89, ours=0.97)))
    assert broken["M ≥ 2048: fraction of ideal, planner"] == "**short**: kept at 0 of 4 points"
    assert broken["M ≤ 256, chain: fastest peer over planner"] == "**short**: kept at 0 of 4 points"
    assert broken["any M: fastest sequential arm over planner"] == "**met**"


def test_what_is_just_short_is_not_rounded_to_what_was_wanted(machine):
    (wanted, *_) = linear_promises.criteria(machine)
    values = {"near": 0.89963, "there": 0.9, "far": 0.853}
    assert wanted.wanted == "≥ 90%" and list(map(wanted.show, values.values())) == ["89.96%", "90.0%", "85.3%"]
    shown = dataclasses.replace(wanted, values=values)
    assert shown.exceptions() == "far: 85.3%; near: 89.96%" and shown.row(3)[2] == "worst 85.3% at far"


def test_exceptions_are_named_and_what_is_missing_is_no_success(machine):
    rows = stored.linear_all_reduce()
    slow = (rows["m"] == 8192) & (rows["layer"] == "Qwen3-8B o_proj") & (rows["method"] == "persistent")
    rows.loc[slow, ["time_us", "fraction_of_ideal"]] = [1000.0, 0.5]
    rows = rows[~((rows["m"] == 2048) & (rows["method"] == "auto"))]
    text = linear_promises.targets(with_table(machine, rows))
    assert "- M ≥ 2048: fraction of ideal, fastest of ours: Qwen3-8B o_proj, M = 8192: " in text
    assert "fraction of ideal, planner: Qwen3-8B o_proj, M = 2048: not measured" in text
    one_launch = with_table(machine, stored.linear_all_reduce().assign(num_launches=1))
    assert "(1 of 3 launches)" in linear_promises.targets(one_launch)


def test_a_speedup_that_cublas_matmul_alone_rules_out_is_said_to_be_out_of_its_reach(machine):
    rows = stored.linear_all_reduce(ours=1.0)
    text = linear_promises.targets(with_table(machine, rows))
    assert "Qwen3-8B o_proj, M = 1: 1.14× (with cuBLAS's matmul alone: 19.4 µs / 5.01 µs = 3.88×)" in text
    assert "out of reach" not in text
    near = linear_promises.targets(with_table(machine, rows.assign(t_matmul_us=rows["t_base_us"] / 1.2)))
    assert near.count("(out of reach of cuBLAS's matmul alone: ") == near.count(" = 1.20×)") == 4


def test_the_rate_at_which_the_weight_is_read_is_told_beside_the_matmuls(machine):
    rows = stored.linear_all_reduce()
    few = (rows["m"] <= MAX_ROWS) & (rows["operation"] == CHAIN)
    rows.loc[few, "t_matmul_us"] = rows["n"] * rows["k"] / rows["tp"] * 2 / 3.5e6  # at 3500 GB/s
    text = linear.weight_rates(with_table(machine, rows))
    assert "torch's matmul alone at 3500 to 3500 GB/s" in text and "a copy within the memory moves" in text
    with pytest.raises(evidence.Missing, match="finished"):
        linear.weight_rates(with_table(machine, rows[~few]))


def test_the_persistent_kernel_is_told_by_what_keeps_it_short(machine):
    found = {(one.layer, one.m): one for one in linear_persistent.points(machine)}
    assert len(found) == 4 and min(m for _, m in found) == 2048

    models = {
        ("Qwen3-8B o_proj", 2048): PersistentTime(waves=49.0, first=12.0, last_sums=11.0, fetched=49.0, end=8.0),
        ("Qwen3-32B down_proj", 8192): PersistentTime(waves=500.0, first=48.0, last_sums=5.0, fetched=100.0, end=8.0),
    }

    def at(layer: str, m: int, matmul: float, time: float) -> linear_persistent.Point:
        changes = {"model": models[layer, m], "matmul_us": matmul, "ideal_us": matmul, "time_us": time}
        return dataclasses.replace(found[layer, m], **changes)

    short = "Qwen3-8B o_proj", 2048
    model = models[short]
    assert at(*short, 0.5 * model.transfers, model.total).cause == linear_persistent.TRANSFERS
    assert at(*short, model.transfers, model.total).cause == linear_persistent.SUMS
    # It took longer than the model tells: of that a faster matmul gains no more than by the model.
    slower = at(*short, 0.5 * model.transfers, 2 * model.total)
    assert slower.cause == linear_persistent.TRANSFERS
    assert slower.with_cublas_us[1] == pytest.approx(slower.with_cublas.total + model.total)
    long = "Qwen3-32B down_proj", 8192
    whole = models[long].total
    assert at(*long, 0.8 * whole, whole).cause == linear_persistent.MATMUL_ITSELF
    assert at(*long, 0.95 * whole, 1.1 * whole).cause == linear_persistent.MODEL
    assert at(*long, 0.95 * whole, whole).cause == ""


def test_a_run_that_tells_no_tiles_is_compared_with_no_model_but_its_results_are_told(machine):
    silent = with_table(machine, stored.linear_all_reduce().assign(tiling=""))
    with pytest.raises(evidence.Missing, match="tells the tiles it took"):
        linear_persistent.told(silent)
    assert linear_persistent.shortfalls(silent) == []
    assert "of the ideal" in linear_findings.one_kernel(silent, pathlib.Path()).sentence


def test_what_a_faster_matmul_gives_follows_from_the_measured_time(machine):
    """The model is too slow at the point: by the waves alone, or by what comes beside them, which decides the cause."""
    (one,) = [one for one in linear_persistent.points(machine) if (one.layer, one.m) == ("Qwen3-32B down_proj", 2048)]
    parts = PersistentTime(waves=145.0, first=40.0, last_sums=11.0, fetched=30.0, end=8.0)
    point = dataclasses.replace(one, model=parts, matmul_us=129.0, ideal_us=129.0, time_us=158.0)
    least, most = point.reach
    slow, fast = (side_by_side(waves + 11, 70 + HOP_US, NORM) for waves in (145, 129))
    assert least == pytest.approx(129 / (fast + 8))  # the whole error lies in the waves
    assert most == pytest.approx(129 / (158 - slow + fast))  # ... beside them
    assert least < 0.9 < most and point.cause == linear_persistent.UNDECIDED
    right = dataclasses.replace(point, time_us=parts.total)
    assert right.reach == pytest.approx((least, least)) and right.cause == linear_persistent.SUMS
    # With waves modelled longer than all that was measured, the matmul alone is the most that can be promised.
    faster = dataclasses.replace(point, time_us=140.0, wanted=0.95)
    assert faster.reach[1] == 1.0


def test_the_persistent_model_says_on_which_machine_its_constants_were_set(machine):
    assert "runs on h200-x2 and h200-x4, those of h200-x2's table" in linear_persistent.constants(machine)
    other = dataclasses.replace(machine, name="h100-x2", hardware="h100-x2")
    assert "what the machines differ by" in linear_persistent.constants(other)


def test_an_all_reduce_in_lines_is_not_called_so_where_it_is_push(machine):
    for name, most in looks.PUSH_ABOVE.items():
        backend = comm.backend(name)
        assert backend.max_bytes == most and style.size_label(most) in looks.look(name).label
        assert f"push, {backend.num_ctas} CTAs" == looks.look(looks.ABOVE).label
    assert looks.label_at("sequential_maco_ll128", 2**22) == "sequential, lines of 128 B"
    assert looks.label_at("sequential_maco_ll128", 2**23) == "sequential, push, 128 CTAs"
    assert looks.label_at("maco_ll", 2**18) == "one-shot in lines"
    assert looks.label_at("maco_ll", 2**18 + 8) == "push, 128 CTAs"
    assert looks.label_at("sequential_maco_ll", 8192) == "sequential, one-shot in lines"
    assert looks.label_at("sequential_maco_ll", 2**20) == "sequential, push, 128 CTAs"
    rows = stored.linear_all_reduce()
    rows.loc[rows["m"] <= 256, "t_comm_backend"] = "maco_ll"
    text = linear.comparison(with_table(machine, rows))
    lines = {int(line.split("|")[2]): line for line in text.splitlines()[2:] if "Qwen3-8B o_proj" in line}
    assert "(one-shot in lines)" in lines[1] and "(push, 128 CTAs)" in lines[64]  # of 512 KiB


def test_the_report_shows_the_section_and_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "stale_tables", lambda *arguments: [])
    monkeypatch.setattr(figures, "write", lambda *arguments: [])
    store = stored.study(tmp_path)
    report.build(tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    section = text[text.index("## 5. ") : text.index("## Conclusion")]
    assert "persistent kernel, 69.5 [68.8, 70.2] µs" in section and "**1.68×**" in section
    assert "tuned, it chose `persistent` 8×" in section
    assert "over 4 points; by it the matmul limits" in section
    assert "off by 10.0% in the median, 10.0% at worst, over 8 points" in section
    assert "torch async-TP (matmul_all_reduce): failed at 4 of 4 points: RuntimeError: not here" in section
    (store.data / "h200-x2" / "linear_all_reduce.json").unlink()
    report.build(tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    section = text[text.index("## 5. ") : text.index("## Conclusion")]
    assert "section linear_all_reduce is MISSING" in section and "µs" not in section


def hand_over_rows(**changes) -> pd.DataFrame:
    """Issued: one launch went wrong; replayed: right, but for less than was asked for."""
    row = {
        "layer": "Qwen3-32B o_proj", "m": 2048, "n": 5120, "k": 1024, "strict": False, "asked_tiles": 10**8,
        "num_launches_done": 78300, "seconds": 9.0,
    }  # fmt: skip
    wrong = {"num_wrong": 1, "correct": False, "error": "1 of 78300 launches left wrong bits"}
    return pd.DataFrame([
        {**row, "launch": "eager", "num_tiles": 100_224_000, **wrong},
        {**row, "launch": "replayed", "num_tiles": 99_000_000, "num_wrong": 0, "correct": True, "error": ""},
    ])  # fmt: skip


def strict_rows() -> pd.DataFrame:
    rows = [
        {"layer": layer, "m": m, "ratio": ratio, "ratio_lo": ratio - 0.01, "ratio_hi": ratio + 0.01, "correct": True}
        for layer, m, ratio in (("Qwen3-8B o_proj", 512, 1.16), ("Qwen3-8B o_proj", 2048, 1.02),
                                ("Qwen3-32B o_proj", 512, 1.04))
    ]  # fmt: skip
    failed = {"layer": "Qwen3-32B o_proj", "m": 2048, "ratio": np.nan, "correct": False, "error": "strict fence: wrong"}
    return pd.DataFrame([*rows, failed]).fillna({"error": ""})


def completed(name: str, rows: pd.DataFrame) -> pd.DataFrame:
    return check_rows(stored.sections.table(name)[1], stored.completed(stored.sections.table(name)[1], rows), "test")


def test_the_report_tells_what_went_wrong_in_the_order_of_memory_and_what_was_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "stale_tables", lambda *arguments: [])
    monkeypatch.setattr(figures, "write", lambda *arguments: [])
    store = stored.study(tmp_path)

    def told() -> str:
        assert report.build(tmp_path) == []
        text = (tmp_path / "REPORT.md").read_text()
        return text[text.index("#### Memory order, h200-x2") : text.index("#### Decoding")]

    assert told().count("was not measured on h200-x2") == 1
    for name, rows in (("hand_over", hand_over_rows()), ("strict_cost", strict_rows())):
        store.write_table("h200-x2", stored.sections.table(name)[1], completed(name, rows), {"keys": []})
    text = told()
    assert "| eager | default | 100,224,000 | 78,300 | **1** | 1 of 78300 launches left wrong bits |" in text
    assert "| replayed | default | 99,000,000 of 100,000,000 asked | 78,300 | 0 |  |" in text
    worst = "+16.0% [+15.0%, +17.0%] | Qwen3-8B o_proj, M = 512 | strict fence: wrong |"
    assert f"| 1 of 4 | +4.0% | {worst}" in text
    assert "was not measured" not in text


def test_tiles_are_handed_over_and_fences_compared_on_gpus_alone():
    for name in ("hand_over", "strict_cost"):
        dataset = stored.sections.table(name)[1]
        assert all(points(dataset, profile, CPU) == [] for profile in ("smoke", "standard", "full"))
    hand_over, strict_cost = (stored.sections.table(name)[1] for name in ("hand_over", "strict_cost"))
    asked = points(hand_over, "full", GPUS)
    assert [(one["launch"], one["strict"], one["num_tiles"]) for one in asked] == [
        ("eager", False, 10**8), ("replayed", False, 10**8),
    ]  # fmt: skip
    assert {(one["m"], one["n"], one["k"]) for one in asked} == {(2048, 5120, 1024)}
    assert {one["num_tiles"] for one in points(hand_over, "smoke", GPUS)} == {10**6}
    compared = points(strict_cost, "full", GPUS)
    rows = {512, 1024, 2048, 4096, 8192, 16384}
    assert {(one["layer"], one["m"]) for one in compared} == {(layer, m) for layer in LAYERS for m in rows}
    with pytest.raises(ValueError, match="hand_over_shrink_k = 4096 leaves Qwen3-32B o_proj K = 2"):
        points(hand_over, "full", GPUS, hand_over_shrink_k=4096)


def hand_over_refused(rank: int, num_ranks: int) -> None:
    from study.harness.worker import Context
    from study.sections.linear_all_reduce import measure_hand_over as hand_over
    from study.sections.linear_all_reduce import measure_strict_cost as strict_cost

    context = Context(rank, num_ranks, torch.device("cpu"), dist.group.WORLD, pathlib.Path(os.devnull))
    shape = {"layer": "Qwen3-8B o_proj", "m": 300, "n": 96, "k": 64, "dtype": "bf16"}
    for name, program, more in (
        ("hand_over", hand_over, {"launch": "replayed", "strict": True, "num_tiles": 10, "max_seconds": 1.0}),
        ("strict_cost", strict_cost, {"budget_s": 0.01, "min_iterations": 5}),
    ):
        rows = pd.DataFrame(program.measure({**shape, **more}, context).rows).assign(point_key="k", num_launches=1)
        rows = check_rows(stored.sections.table(name)[1], rows, "test")
        assert not rows["correct"].any() and "it is for Hopper GPUs, x is on cpu" in rows["error"].iloc[0]


def test_where_the_persistent_kernel_cannot_run_the_row_says_why():
    run_ranks(hand_over_refused)


def test_what_an_earlier_launch_left_is_counted_wherever_it_lies():
    from study.sections.linear_all_reduce import measure_hand_over as hand_over

    firsts = [torch.randn(8, 16).to(torch.bfloat16) for _ in range(hand_over.NUM_INPUTS)]
    results = [torch.full_like(firsts[0], torch.nan) for _ in range(hand_over.BURST)]
    num_wrong, launched = torch.zeros((), dtype=torch.int64), []

    def rounds(num_rounds: int, broken) -> int:
        """So many rounds of launches, those that are `broken(number)` without their last tile; how many were wrong."""
        num_wrong.zero_()
        launched.clear()

        def launch(which: int, result: torch.Tensor) -> None:
            launched.append(which)
            kept = result[4:, 8:].clone()
            result.copy_(firsts[which])
            if broken(len(launched) - 1):
                result[4:, 8:] = kept

        for _ in range(num_rounds):
            hand_over.one_round(launch, firsts, results, num_wrong)
        return int(num_wrong)

    assert rounds(3, lambda number: False) == 0 and len(launched) == 3 * hand_over.ROUND
    assert all(one != other for one, other in zip(launched, launched[1:], strict=False))
    assert rounds(3, lambda number: number == 17) == 1
    # What is left of the round before is of other inputs, too: a graph holds a round.
    first = range(hand_over.ROUND, hand_over.ROUND + hand_over.BURST)
    assert rounds(3, first.__contains__) == hand_over.BURST


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_tiles_that_are_handed_over_are_counted_by_the_kernels_order(num_ranks):
    from maco_lib.linear.techniques.persistent_time import order_of
    from study.sections.linear_all_reduce.measure_hand_over import handed_over

    order = order_of(2048, 5120, 512, fastest_tiling(2048, 5120, 512, num_ranks, 66), num_ranks, 66)
    # Each tile's partials go to its owner, and its sum to all others.
    assert handed_over(order) == 2 * (num_ranks - 1) * order.num_tiles
