"""Sections 1 and 3: what they ask for, that a wrong arm is reported and never timed, and the fit."""

import os
import pathlib

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from study.harness.machine import Machine
from study.harness.spec import check_rows, point_key
from study.results.launch import plan
from study.sections.bandwidth import section as bandwidth
from study.sections.overlap import section as overlap

CPU = Machine("cpu", 2, "cpu-2", "0" * 16, 24 * 2**30, {})
# As data/h200-x2/overlap.csv had it before there was a planner: 1 MiB beside n = 1024, in the sweep of profile "full".
POINT_OF_BEFORE = "890ca627df5765eb"
GPUS = Machine("cuda", 4, "h200-x4", "0" * 16, 140 * 2**30, {})


def points(section, profile: str, machine: Machine, **given) -> list[dict]:
    return section.SECTION.datasets[0].points(section.SECTION.resolve(profile, machine, given), machine)


def test_the_published_configurations_are_asked_for_as_printed():
    asked = points(overlap, "full", GPUS)
    sizes = {
        (p["configuration"], p["comm_bytes"] // 2**20, p["matmul_n"]) for p in asked if p["configuration"] != "sweep"
    }
    assert sizes == {
        ("Small compute, medium comm", 8, 1024),
        ("Medium compute, large comm", 32, 2048),
        ("Large compute, large comm", 32, 4096),
        ("Large compute, very large comm", 64, 4096),
    }
    assert {p.get("iterations") for p in asked if p["protocol"] == "published"} == {50}


def test_what_was_measured_before_the_planner_is_still_what_its_parameters_ask_for():
    recorded = {"sweep_comm_bytes": [2**20], "sweep_matmul_n": [1024], "sweep_budget_s": 0.1}  # names no methods
    asked = plan(overlap.OVERLAP, overlap.OverlapParameters(**recorded, num_ranks=2), GPUS)
    assert "auto" not in ",".join(point["methods"] for point in asked)
    assert point_key("overlap", 1, asked[-1]) == POINT_OF_BEFORE  # measured by method version 1
    assert all("auto" in point["methods"] for point in points(overlap, "full", GPUS) if point["protocol"] == "device")


def test_eager_code_is_asked_for_in_both_launch_modes_and_by_machines_of_before_not_at_all():
    asked = overlap.OVERLAP_EAGER.points(overlap.SECTION.resolve("full", GPUS, {}), GPUS)
    assert [point["configuration"] for point in asked] == list(overlap.PUBLISHED)
    assert {(point["launched"], point["budget_s"]) for point in asked} == {("graph,eager", 0.25)}
    assert {"sequential", "two_stream", "auto"} < set(asked[0]["methods"].split(","))
    (here,) = overlap.OVERLAP_EAGER.points(overlap.SECTION.resolve("smoke", CPU, {}), CPU)
    assert here["launched"] == "eager" and here["comm_bytes"] == 2**15
    assert overlap.OVERLAP_EAGER.points(overlap.OverlapParameters(), GPUS) == []


def test_bandwidth_sizes_double_and_the_published_ones_are_always_there():
    asked = points(bandwidth, "standard", CPU)
    gathers = [p["bytes"] for p in asked if p["collective"] == "all_gather"]
    assert gathers == [8192 << k for k in range(12)]
    assert {8 << 20, 32 << 20, 64 << 20} <= {p["bytes"] for p in asked if p["collective"] == "all_reduce"}
    assert max(p["bytes"] for p in points(bandwidth, "full", GPUS)) == 2**30


@pytest.mark.parametrize(
    ("section", "given", "message"),
    [
        (overlap, {"configurations": ["Huge compute"]}, "'Huge compute'.*Small compute, medium comm"),
        (overlap, {"sweep_comm_bytes": [2**40], "sweep_matmul_n": [64]}, "comm_bytes = 1099511627776 .* GiB"),
        (overlap, {"sweep_comm_bytes": [1024], "sweep_matmul_n": [200_000]}, "matmul_n = 200000 needs"),
        (overlap, {"sweep_comm_bytes": [10], "sweep_matmul_n": [64]}, "comm_bytes = 10 "),
        (overlap, {"methods": ["sequential", "telepathy"]}, "'telepathy'.*maco_staged_8_stream"),
        (overlap, {"sweep_methods": ["two_stream"]}, "'sequential'"),
        (bandwidth, {"max_bytes": 2**38}, "all_reduce of .* GiB"),
        (bandwidth, {"min_bytes": 4096, "max_bytes": 1024}, "min_bytes = 4096"),
        (bandwidth, {"min_bytes": 8}, "min_bytes = 8 "),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(section, given, message):
    with pytest.raises(ValueError, match=message):
        points(section, "smoke", CPU, **given)


def test_one_rank_has_nothing_to_communicate():
    parameters = overlap.SECTION.resolve("smoke", CPU, {"num_ranks": 1})
    assert "2 ranks" in overlap.OVERLAP.unavailable(parameters, CPU)


def measure_with_a_wrong_arm(rank: int, num_ranks: int) -> None:
    from maco_lib.timing import Arm
    from study.harness.worker import Context
    from study.sections.overlap import measure as program
    from study.sections.overlap.problem import Problem

    good = Problem.planned

    def spoiled(self, name, plan, *rest):
        arm = good(self, name, plan, *rest)

        def run() -> None:
            arm.run()
            self.product[3, 3:] += 100 * (rank == 1)

        return Arm(name, run, arm.prepare) if name == "two_stream" else arm

    events = pathlib.Path(os.environ["MACO_CACHE"], "events.jsonl")
    context = Context(rank, num_ranks, torch.device("cpu"), dist.group.WORLD, events)
    point = {
        "configuration": "sweep", "comm_bytes": 4096, "matmul_n": 64, "protocol": "device", "dtype": "bf16",
        "methods": "sequential,two_stream,two_shot_stream,auto", "budget_s": 0.01, "min_iterations": 5,
    }  # fmt: skip
    right = program.measure(point, context)
    Problem.planned = spoiled
    wrong = program.measure(point, context)
    for result in (right, wrong):
        table = pd.DataFrame(result.rows).assign(point_key="k", num_launches=1)
        check_rows(overlap.OVERLAP, table, "test")
    sequential, two_stream, two_shot, auto = right.rows
    assert sequential["correct"] and sequential["speedup"] == 1.0 and two_stream["correct"]
    assert two_stream["ideal_us"] == max(two_stream["t_comp_us"], two_stream["t_comm_us"])
    assert two_stream["fraction_of_ideal"] == two_stream["ideal_us"] / two_stream["t_overlap_us"]
    assert two_stream["speedup"] == pytest.approx(two_stream["t_seq_us"] / two_stream["t_overlap_us"])
    assert two_stream["sigma_comm"] > 0 and two_stream["sigma_comp"] > 0
    assert not two_shot["correct"] and "GPUs" in two_shot["error"]  # what cannot run here says why
    assert (sequential["plan"], two_stream["plan"]) == ("gloo, sequential", "gloo, overlapped")
    plans = (sequential["plan"], two_stream["plan"], "gloo, overlapped, computation first")
    assert auto["correct"] and auto["plan"] in plans
    assert auto["speedup_collective"] == 1.0 and auto["speedup_overlap"] == pytest.approx(auto["speedup"])
    sequential, two_stream, _, auto = wrong.rows
    assert sequential["correct"] and auto["correct"]
    assert not two_stream["correct"] and "rank 1: matmul: relative error" in two_stream["error"]
    assert np.isnan(two_stream["t_overlap_us"]) and np.isnan(two_stream["speedup"])
    assert "two_stream" not in {samples.labels["arm"] for samples in wrong.samples}


def test_a_wrong_arm_is_reported_and_never_timed(tmp_path, monkeypatch):
    monkeypatch.setenv("MACO_CACHE", str(tmp_path))
    run_ranks(measure_with_a_wrong_arm)


def measure_in_eager_code(rank: int, num_ranks: int) -> None:
    from study.harness.worker import Context
    from study.sections.overlap import measure_eager as program

    events = pathlib.Path(os.environ["MACO_CACHE"], "events.jsonl")
    context = Context(rank, num_ranks, torch.device("cpu"), dist.group.WORLD, events)
    point = {
        "configuration": "sweep", "comm_bytes": 4096, "matmul_n": 64, "dtype": "bf16", "launched": "eager",
        "methods": "sequential,two_stream,maco_staged_8_stream,auto", "budget_s": 0.01, "min_iterations": 5,
    }  # fmt: skip
    result = program.measure(point, context)
    check_rows(overlap.OVERLAP_EAGER, pd.DataFrame(result.rows).assign(point_key="k", num_launches=1), "test")
    sequential, two_stream, staged, auto = result.rows
    assert sequential["speedup"] == 1.0 and sequential["t_overlap_us"] == sequential["t_seq_us"]
    assert two_stream["speedup"] == pytest.approx(two_stream["t_seq_us"] / two_stream["t_overlap_us"])
    assert (two_stream["plan"], two_stream["timing"], two_stream["leads"]) == ("gloo, overlapped", "host", False)
    assert not staged["correct"] and "GPUs" in staged["error"] and np.isnan(staged["t_overlap_us"])
    plans = (sequential["plan"], two_stream["plan"], "gloo, overlapped, computation first")
    assert auto["correct"] and auto["plan"] in plans
    assert {(one.labels["arm"], one.labels["launched"]) for one in result.samples} == {
        (name, "eager") for name in ("sequential", "two_stream", "auto")
    }


def test_eager_code_is_measured_on_cpu_ranks_and_what_cannot_run_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("MACO_CACHE", str(tmp_path))
    run_ranks(measure_in_eager_code)


def bandwidth_table(latency_us: float, gb_per_s: float, noise: float = 0.0) -> pd.DataFrame:
    size = np.array([8192 << k for k in range(12)], float)
    time_us = latency_us + size * 1.5 / gb_per_s / 1e3
    time_us *= np.random.default_rng(0).lognormal(0, noise, len(size))
    busbw = size * 1.5 / time_us / 1e3
    return pd.DataFrame({"collective": "all_reduce", "backend": "nccl", "bytes": size.astype(int), "time_us": time_us,
                         "busbw_gb_per_s": busbw})  # fmt: skip


def test_the_fit_finds_latency_and_bandwidth_again():
    exact = bandwidth.bandwidth_fit({"bandwidth": bandwidth_table(16.0, 270.0)}, None).iloc[0]
    assert exact["latency_us"] == pytest.approx(16.0) and exact["bandwidth_gb_per_s"] == pytest.approx(270.0)
    assert exact["rms_relative_error"] < 1e-6
    noisy = bandwidth.bandwidth_fit({"bandwidth": bandwidth_table(16.0, 270.0, noise=0.05)}, None)
    check_rows(bandwidth.FIT, noisy, "test")
    assert noisy["bandwidth_gb_per_s"].iloc[0] == pytest.approx(270, rel=0.15)
    assert 0.02 < noisy["rms_relative_error"].iloc[0] < 0.1


def test_times_that_do_not_grow_have_no_bandwidth():
    flat = bandwidth_table(16.0, 270.0).assign(time_us=20.0)
    flat["busbw_gb_per_s"] = flat["bytes"] * 1.5 / 20.0 / 1e3
    result = bandwidth.bandwidth_fit({"bandwidth": flat}, None).iloc[0]
    assert result["latency_us"] == pytest.approx(20.0, rel=0.01)
    falling = bandwidth_table(16.0, 270.0)
    falling["time_us"] = 40.0 - np.arange(12)
    falling["busbw_gb_per_s"] = falling["bytes"] * 1.5 / falling["time_us"] / 1e3
    assert np.isnan(bandwidth.bandwidth_fit({"bandwidth": falling}, None)["bandwidth_gb_per_s"].iloc[0])
