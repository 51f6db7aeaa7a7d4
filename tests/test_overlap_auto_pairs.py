"""The experiment of `plan="auto"` beside every plan: what it draws, which plans it tries, a run on 2 ranks."""

import json
import math
import os
import pathlib
import statistics

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from maco_lib.overlap import search
from maco_lib.overlap.plan import Plan, sequential
from study.sections.overlap import measure_auto_pairs as experiment

KIB = 2**10
CHECKOUT = pathlib.Path(__file__).resolve().parents[1]


def test_pairs_are_the_same_for_a_seed_and_even_in_the_logarithm():
    known, *drawn = experiment.pairs(25, 200)
    assert known == (100 * 2**20, 5120) and drawn == experiment.pairs(25, 200)[1:] != experiment.pairs(26, 200)[1:]
    assert all(64 * KIB <= size <= 2**28 and size % 16 == 0 and 512 <= n <= 8192 and n % 8 == 0 for size, n in drawn)
    assert 80 < sum(size < math.sqrt(2**16 * 2**28) for size, _ in drawn) < 120
    assert all(size <= 4096 and n <= 64 for size, n in experiment.pairs(25, 20, 4096, 64))


def test_every_plan_that_the_planner_may_try_is_among_all():
    names = ["nccl", "maco_pull_8", "maco_staged_12", "maco_push_64"]
    plans = experiment.every_plan("cuda", names, experiment.LEAVES)
    assert len(set(plans)) == len(plans) == len(names) * (1 + len(experiment.ORDERS) * len(experiment.LEAVES))
    first = search.first_look("cuda", names, True).plans
    closer = search.closer_look("cuda", {plan: float(number) for number, plan in enumerate(first)}, True).plans
    assert {*first, *closer} <= set(plans)
    assert experiment.every_plan("cpu", ["gloo"], [0]) == [
        sequential("cpu"), Plan("gloo", urgent=False), Plan("gloo", urgent=False, compute_first=True),
    ]  # fmt: skip


def measure(rank: int, num_ranks: int) -> None:
    out = pathlib.Path(os.environ["MACO_CACHE"], "pairs.json")
    asked = ["--out", str(out), "--num-pairs", "2", "--max-bytes", str(64 * KIB), "--max-n", "64", "--budget-s", "0.1"]
    found = experiment.run(experiment.parsed(asked), torch.device("cpu"), dist.group.WORLD)
    if rank == 0:
        assert json.loads(out.read_text()) == json.loads(json.dumps(found))


def test_a_run_tells_what_was_chosen_and_what_was_best(tmp_path, monkeypatch):
    monkeypatch.setenv("MACO_CACHE", str(tmp_path))
    told = run_ranks(measure, timeout_s=60)
    found = json.loads((tmp_path / "pairs.json").read_text())
    assert len(found["rows"]) == found["summary"]["num_pairs"] == 2 and told.count("bytes, n = ") == 2
    for row in found["rows"]:
        assert row["chosen"] in row["finalists_us"] and len(row["first_look_us"]) == row["num_plans"] == 3
        assert row["best_us"] == min(row["finalists_us"].values()) == row["finalists_us"][row["best"]]
        assert row["ratio"] == pytest.approx(row["auto_us"] / row["best_us"]) and row["plan_ratio"] >= 1
    assert found["summary"]["worst_ratio"] == max(row["ratio"] for row in found["rows"])


def test_the_stages_find_what_is_nearly_the_best_of_all_that_was_measured():
    """By the stored first look at every plan of 21 pairs on 2 H200s."""
    losses = []
    for row in json.loads((CHECKOUT / "data" / "auto_pairs" / "h200-x2.json").read_text())["rows"]:
        times = row["first_look_us"]
        backends = list(dict.fromkeys(name.split(",")[0] for name in times))
        first = search.first_look("cuda", backends, True).plans
        seen = {plan: times[str(plan)] for plan in first}
        seen |= {plan: times[str(plan)] for plan in search.closer_look("cuda", seen, True).plans}
        losses.append(min(seen[plan] for plan in search.final("cuda", seen).plans) / min(times.values()))
        assert len(seen) < 0.15 * len(times)
    assert statistics.median(losses) <= 1.02 and max(losses) <= 1.05, sorted(losses)[-5:]
