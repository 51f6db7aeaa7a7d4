"""Section 2: the checkpoint that the arms share, what the section asks for, and the real program on this machine."""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from study.harness.machine import Machine, this_machine
from study.sections.inference import section as inference
from study.sections.inference.checkpoint import KNOWN_MODELS, resolve, weight_bytes

CHECKOUT = pathlib.Path(__file__).parent.parent
SECTION, INFERENCE = inference.SECTION, inference.INFERENCE
CPU = Machine("cpu", 2, "cpu-2", "0" * 16, 24 * 2**30, {})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def checkpoint(cache):
    return resolve("Qwen3-tiny", cache)


def test_random_checkpoint_is_saved_once_and_is_the_same_everywhere(checkpoint, cache, tmp_path):
    written = {path: path.stat().st_mtime_ns for path in checkpoint.path.iterdir()}
    assert resolve("Qwen3-tiny", cache) == checkpoint
    assert {path: path.stat().st_mtime_ns for path in checkpoint.path.iterdir()} == written
    assert [path.name for path in checkpoint.path.parent.iterdir()] == [checkpoint.path.name]
    assert resolve("Qwen3-tiny", tmp_path).identity == checkpoint.identity


def test_dimensions_tell_the_size_of_the_checkpoint(checkpoint):
    norms = 2 * 256 * 2 + 2 * 2 * 64 + 256
    assert checkpoint.weights == "random"
    assert checkpoint.num_parameters == weight_bytes("Qwen3-tiny") // 2 + norms
    assert weight_bytes("Qwen3-0.6B-Base") == pytest.approx(2 * 596e6, rel=0.01)


def test_folder_is_taken_as_it_is_and_other_weights_have_another_identity(checkpoint, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(checkpoint.path, folder)
    local = resolve(str(folder))
    assert (local.weights, local.path, local.identity) == ("local", folder, checkpoint.identity)
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(-2, os.SEEK_END)
        stream.write(b"\x12\x34")
    assert resolve(str(folder)).identity != checkpoint.identity


def damage_weights(folder):
    os.truncate(folder / "model.safetensors", 100_000)


def damage_config(folder):
    (folder / "config.json").write_text("{}")


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [damage_weights, damage_config, remove_weights])
def test_folder_that_is_no_checkpoint_is_named_before_anything_runs(checkpoint, tmp_path, damage):
    folder = tmp_path / "mine"
    shutil.copytree(checkpoint.path, folder)
    damage(folder)
    with pytest.raises(ValueError, match=f"{folder} is not a checkpoint"):
        SECTION.resolve("smoke", CPU, {"model": str(folder)})


@pytest.mark.parametrize("model", ["Qwen9-huge", "./not-there", "nobody/nothing"])
def test_unknown_model_is_rejected_with_the_known_ones(monkeypatch, model):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=model.replace(".", r"\.") + "|not-there") as failure:
        SECTION.resolve("smoke", CPU, {"model": model})
    assert model.startswith(".") or all(name in str(failure.value) for name in KNOWN_MODELS)


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "http://127.0.0.1:9", "socks9://x", "http://[bad"])
def test_a_hub_behind_a_proxy_that_does_not_work_is_no_hub(tmp_path, proxy):
    """Whatever the HTTP client says of the proxy: then random weights are made, as without a network."""
    variables = ("http_proxy", "https_proxy", "no_proxy", "all_proxy", "HF_HUB_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name.lower() not in map(str.lower, variables)}
    environment |= {"ALL_PROXY": proxy, "HF_HOME": str(tmp_path), "PYTHONPATH": str(CHECKOUT)}
    take = "from study.sections.inference import checkpoint"
    program = f"{take}; print(checkpoint._snapshot('Qwen/Qwen3-0.6B', local_files_only=False))"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "None\n", done.stderr


def test_model_larger_than_the_memory_is_rejected():
    parameters = SECTION.resolve("standard", CPU, {"model": "Qwen3-32B"})
    with pytest.raises(ValueError, match="Qwen3-32B"):
        INFERENCE.points(parameters, CPU)


@pytest.mark.parametrize("override", [{"arms": ["vlm"]}, {"batches": []}, {"batches": [0]}, {"new_tokens": "32"},
                                      {"dtype": "int8"}, {"num_ranks": 2}, {"num_repeats": 0}])  # fmt: skip
def test_bad_parameters_are_named(override):
    with pytest.raises(ValueError, match=next(iter(override))):
        SECTION.resolve("smoke", CPU, override)


def test_every_arm_gets_its_own_process_and_batch_one_first():
    points = INFERENCE.points(SECTION.resolve("standard", CPU, {"batches": [8, 1]}), CPU)
    assert [point["batch"] for point in points] == [1, 8] * 4
    assert len({INFERENCE.group(point) for point in points}) == 4
    assert len({INFERENCE.key(point) for point in points}) == len(points)


def row(arm, e2e_ms, tokens="1 2 3", **changes):
    times = {"e2e_ms": e2e_ms, "e2e_lo_ms": 0.9 * e2e_ms, "e2e_hi_ms": 1.1 * e2e_ms, "ttft_ms": e2e_ms / 10,
             "tpot_ms": e2e_ms / 20, "tokens_per_s": 1.0, "start_s": 1.0, "reference_gap": 0.0}  # fmt: skip
    facts = {"point_key": "0", "arm": arm, "batch": 1, "prompt_tokens": 6, "new_tokens": 3, "model": "m", "dtype": "d",
             "weights": "random", "checkpoint": "c", "parameters_millions": 1.0, "engine": "e", "threads": 2,
             "first_tokens": tokens, "correct": True, "error": "", "num_launches": 1}  # fmt: skip
    return {**facts, **times, **changes}


def test_steps_multiply_to_the_whole_and_a_failed_arm_has_no_speedup():
    failed = {"tokens_per_s": math.nan, "start_s": math.nan, "checkpoint": "", "correct": False, "error": "no vllm"}
    rows = pd.DataFrame([
        row("transformers_eager", 100.0),
        row("transformers_compiled", 50.0, "1 2 9"),
        row("vllm_eager", math.nan, "", **failed),
        row("vllm", 10.0, checkpoint="other"),
    ])  # fmt: skip
    table = INFERENCE.schema.validate(INFERENCE.finish(rows)).set_index("arm")
    assert table.loc["transformers_compiled", "speedup"] == pytest.approx(2)
    assert table.loc["transformers_compiled", "speedup_lo"] == pytest.approx(90 / 55)
    assert table.loc["transformers_compiled", "tokens_equal_to_baseline"] == 2
    assert math.isnan(table.loc["vllm_eager", "speedup"]) and math.isnan(table.loc["vllm", "speedup"])
    steps = inference.attribute({"inference": table.reset_index()}, None)
    assert list(zip(steps["from_arm"], steps["to_arm"], steps["factor"], strict=True)) == [
        ("transformers_eager", "transformers_compiled", 2.0), ("transformers_compiled", "vllm", 5.0),
    ]  # fmt: skip
    assert steps["log_share"].sum() == pytest.approx(1)


def run_program(arm, points, folder, cache):
    """Run the program for one arm as the launcher does, without a launcher; its journal's rows."""
    specification = {
        "kind": this_machine().kind, "launch": "test", "repeat": 0, "collective_timeout_s": 60.0,
        "events": str(folder / f"{arm}.events"), "journal": str(folder / "journal"),
        "points": [{"key": INFERENCE.key(point), "point": point, "label": arm} for point in points],
    }  # fmt: skip
    (folder / f"{arm}.json").write_text(json.dumps(specification))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m",
               INFERENCE.program, str(folder / f"{arm}.json")]  # fmt: skip
    path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "MACO_CACHE": str(cache)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "journal").read_text().splitlines()]
    return [(line["point"], *line["rows"]) for line in lines if line["point"]["arm"] == arm]


@pytest.mark.slow
def test_the_engines_choose_the_same_tokens_in_float32(tmp_path, cache):
    """Real engines under torchrun: `vllm` as it comes is left to the notebook's smoke run, it starts slowest."""
    arms = ["transformers_eager", "transformers_compiled", "vllm_eager"]
    overrides = {"arms": arms, "batches": [1, 3], "dtype": "float32", "prompt_tokens": 9,
                 "num_repeats": 1, "num_batched_repeats": 1}  # fmt: skip
    machine = this_machine()
    points = INFERENCE.points(SECTION.resolve("smoke", machine, overrides), machine)
    rows = []
    for arm in arms:
        for point, result in run_program(arm, [point for point in points if point["arm"] == arm], tmp_path, cache):
            rows.append({"point_key": INFERENCE.key(point), "num_launches": 1, "error": "", **point, **result})
    table = INFERENCE.schema.validate(INFERENCE.finish(pd.DataFrame(rows)))
    assert table["error"].tolist() == [""] * 6
    assert table["correct"].all()
    assert (table["tokens_equal_to_baseline"] == 8).all()
    assert (table["reference_gap"] < 1e-3).all()
    assert (table["ttft_ms"] < table["e2e_ms"]).all()
    assert table["e2e_ms"].to_numpy() == pytest.approx((table["ttft_ms"] + 7 * table["tpot_ms"]).to_numpy())
    assert table["speedup"].notna().all()
