"""Section 4 and the advice from it, on tables made by the model itself; and the doctor."""

import argparse
import json
import sys

import numpy as np
import pandas as pd
import pytest

from study.commands import advise, doctor
from study.harness.machine import this_machine
from study.harness.spec import check_rows
from study.sections.when_to_overlap import model, section

TRUTH = model.Stretch(1.3, 1.2, 5.0)
RANKS = 4


def overlap_table() -> pd.DataFrame:
    comm, comp = (grid.ravel() for grid in np.meshgrid([8, 32, 64], [1024, 2048, 4096, 8192]))
    t_comm, t_comp = 15 + 5.0 * comm, 2.0 * comp**3 / 700e6
    t_overlap = TRUTH.predict(t_comm, t_comp)
    speedup = (t_comm + t_comp) / t_overlap
    rows = pd.DataFrame({
        "point_key": [f"{i:016x}" for i in range(len(comm))], "configuration": "sweep", "comm_bytes": comm * 2**20,
        "matmul_n": comp, "protocol": "device", "method": "two_stream", "backend": "nccl",
        "t_comm_us": t_comm, "t_comp_us": t_comp,
        "t_seq_us": t_comm + t_comp, "t_overlap_us": t_overlap, "t_overlap_lo_us": t_overlap * 0.99,
        "t_overlap_hi_us": t_overlap * 1.01, "ideal_us": np.maximum(t_comm, t_comp), "speedup": speedup,
        "speedup_lo": speedup * 0.99, "speedup_hi": speedup * 1.01, "num_launches": 1, "correct": True, "error": "",
    })  # fmt: skip
    # What is not to be judged: the sequential arm, the other protocol, an arm that failed.
    others = [
        rows.assign(method="sequential"),
        rows.assign(protocol="published", t_overlap_us=1.0),
        rows.assign(method="two_shot_stream", correct=False, t_overlap_us=np.nan, error="no peer access"),
    ]
    return pd.concat([rows, *others], ignore_index=True)


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    sizes = 2.0 ** np.arange(13, 31)
    time_us = 15 + 5 * sizes / 2**20
    bandwidth = pd.DataFrame({
        "collective": "all_reduce", "backend": "nccl", "bytes": sizes, "time_us": time_us, "correct": True,
        "algbw_gb_per_s": sizes / time_us / 1e3, "busbw_gb_per_s": sizes / time_us / 1e3 * 2 * (RANKS - 1) / RANKS,
    })  # fmt: skip
    matmul = [{"quantity": "matmul", "dtype": "bf16", "m": n, "n": n, "k": n, "time_us": max(5, 2 * n**3 / 700e6)}
              for n in (256, 512, 1024, 2048, 4096, 8192)]  # fmt: skip
    environment = pd.DataFrame([*matmul, {"quantity": "memory_copy", "value": 4000.0, "time_us": 250.0}])
    environment = environment.assign(threads=0, error="")
    overlap = overlap_table()
    when = section.when_to_overlap({"overlap": overlap}, section.WhenParameters())
    return {"overlap": overlap, "bandwidth": bandwidth, "environment": environment, "when_to_overlap": when}


def test_when_to_overlap_predicts_points_it_has_not_seen(tables):
    when = check_rows(section.WHEN_TO_OVERLAP, tables["when_to_overlap"], "test")
    assert set(when["method"]) == {"two_stream"} and len(when) == 12
    assert 0 < when["held_out"].sum() < len(when) / 2
    assert when.loc[when["held_out"], "error"].abs().max() < 0.01
    assert when["new_n_error"].abs().max() < 0.05
    assert (when["predicted_us"] >= when["ideal_us"] * (1 - 1e-6)).all()
    decided = when[when["verdict"].ne("undecided") & when["measured_verdict"].ne("undecided")]
    assert len(decided) and (decided["verdict"] == decided["measured_verdict"]).all()


def test_too_few_shapes_name_the_table_and_the_need(tables):
    few = tables["overlap"].query("comm_bytes == 8 * 2**20 and matmul_n < 8192")
    with pytest.raises(ValueError, match="table overlap has at most 3 shapes.*4 are needed"):
        section.when_to_overlap({"overlap": few}, section.WhenParameters())
    with pytest.raises(ValueError, match="no correct row.*run --only overlap"):
        section.when_to_overlap({"overlap": few.assign(correct=False)}, section.WhenParameters())


def test_model_shares_follow_the_layer_and_say_what_is_extrapolated(tables):
    shares = check_rows(section.MODEL_SHARES, section.model_shares(tables, section.WhenParameters()), "test")
    assert len(shares) == 3 * 2 * (9 + 5)
    assert shares[shares["tp"] == 2]["extrapolated"].all()
    assert not shares[(shares["tp"] == RANKS) & (shares["model"] == "Qwen3-8B")]["extrapolated"].any()
    # Of the smallest model one token is 2 KiB, less than was measured; four tokens are the least size.
    small = shares[(shares["tp"] == RANKS) & (shares["model"] == "Qwen3-0.6B-Base")].set_index("tokens")["extrapolated"]
    assert small[small].index.tolist() == [1, 2]
    row = shares[(shares["model"] == "Qwen3-32B") & (shares["tp"] == 4) & (shares["tokens"] == 4096)].iloc[0]
    # Qwen3-32B at tp 4: 16 heads and 2 kv heads of 128, 6400 of 25600 intermediate features.
    weights = 5120 * (2048 + 2 * 256) + 2048 * 5120 + 3 * 5120 * 6400
    assert row["t_matmul_us"] == pytest.approx(2 * 4096 * weights / 700e6, rel=0.02)
    assert row["t_comm_us"] == pytest.approx(2 * (15 + 5 * 4096 * 5120 * 2 / 2**20), rel=0.05)
    assert 1 < row["gain_lo"] <= row["gain"] <= row["gain_hi"] <= 2
    assert row["gain"] <= row["ideal_gain"]
    with pytest.raises(ValueError, match="method 'magic' was not measured; measured are two_stream"):
        section.model_shares(tables, section.WhenParameters(method="magic"))


def test_advice_agrees_with_the_tables(tables):
    (row,) = advise.advise(tables, tp=RANKS, shape=(4096, 5120, 25600)).to_dict("records")
    assert row["t_matmul_us"] == pytest.approx(2 * 4096 * 5120 * 6400 / 700e6, rel=0.02)
    assert row["comm_share"] == pytest.approx(row["t_comm_us"] / (row["t_comm_us"] + row["t_matmul_us"]))
    assert row["gain"] == pytest.approx(
        (row["t_comm_us"] + row["t_matmul_us"]) / float(TRUTH.predict(row["t_comm_us"], row["t_matmul_us"])), rel=0.01
    )
    assert row["held_out_error"] < 0.01 and not row["extrapolated"]
    layer = advise.advise(tables, tp=RANKS, model_name="Qwen3-32B", tokens=4096).iloc[0]
    share = section.model_shares(tables, section.WhenParameters())
    same = share[(share["model"] == "Qwen3-32B") & (share["tp"] == RANKS) & (share["tokens"] == 4096)].iloc[0]
    assert layer["gain"] == pytest.approx(same["gain"])
    assert "two_stream" in advise.as_text(pd.DataFrame([row]))
    usage = advise.usage(pd.DataFrame([{**row, "method": "copy_engine_stream", "verdict": "undecided"}, row]))
    assert 'plan="auto"' in usage and "plan=Plan(backend=''" in usage and usage.endswith("two_stream")
    assert "No technique above is predicted to help" in advise.usage(pd.DataFrame([{**row, "verdict": "hurts"}]))
    assert f"{row['gain']:.2f}x [" in advise.as_text(pd.DataFrame([row]))
    # Fewer bytes than were measured: marked, technique by technique.
    tiny = advise.advise(tables, tp=RANKS, shape=(1, 1024, 4096))
    assert tiny["extrapolated"].all() and advise.as_text(tiny).splitlines()[-1].endswith("yes")
    assert advise.as_text(pd.DataFrame([row])).splitlines()[-1].endswith("no")
    # A fit that meets its points whatever they are has no error to tell, and is not what to use by hand.
    exact = pd.DataFrame([{**row, "num_training": 3}])
    assert "3 points  not testable" in advise.as_text(exact)
    assert "No technique above is predicted to help" in advise.usage(exact)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--m 1 --n 2 --tp 2", "give either --m, --n and --k, or --model and --tokens"),
        ("--m 1 --n 2 --k 3 --model Qwen3-8B --tokens 4 --tp 2", "give either"),
        ("--m 0 --n 2 --k 4 --tp 2", "--m 0 must be at least 1"),
        ("--m 8 --n 2 --k 4 --tp 1", "--tp 1 has nothing to communicate"),
    ],
)
def test_bad_questions_are_refused(arguments, message):
    parser = argparse.ArgumentParser()
    advise.add_arguments(parser)
    with pytest.raises(ValueError, match=message):
        advise.check(parser.parse_args(arguments.split()))


def test_bad_shapes_models_and_types_are_named(tables):
    with pytest.raises(ValueError, match="tp = 3 does not divide k = 64"):
        advise.advise(tables, tp=3, shape=(1, 1, 64))
    with pytest.raises(ValueError, match="tp = 16 does not divide kv_heads = 8"):
        advise.advise(tables, tp=16, model_name="Qwen3-8B", tokens=1)
    with pytest.raises(ValueError, match="unknown model 'Qwen4'; the models are Qwen3-0.6B-Base"):
        advise.advise(tables, tp=2, model_name="Qwen4", tokens=1)
    with pytest.raises(ValueError, match=r"all_reduce of gloo, of none that the techniques use \(nccl\)"):
        others = {**tables, "bandwidth": tables["bandwidth"].assign(backend="gloo")}
        advise.advise(others, tp=2, shape=(1, 1, 64))
    with pytest.raises(ValueError, match="unknown dtype 'fp8'; the dtypes are bf16, fp16, fp32"):
        advise.advise(tables, tp=2, dtype="fp8", shape=(1, 1, 64))


def test_doctor_says_what_is_missing_and_how_to_get_it():
    checks = {check.name: check for check in doctor.doctor()}
    assert checks["Python"].ok and checks["torch"].ok
    assert ("none visible" in checks["GPUs"].detail) == (this_machine().kind == "cpu")
    assert all(check.remedy for check in checks.values() if check.ok is not True)
    missing = doctor.check_package("no-such-package", None, None, "get it")
    assert missing.ok is False and missing.remedy == "get it"
    too_new = doctor.check_package("torch", (1, 0), (2, 0), "get it")
    assert too_new.ok is False and ">= 1.0 < 2.0 is needed" in too_new.detail


def test_doctor_names_a_kernel_of_another_interpreter(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    for program, ok in (("/other/bin/python", None), (sys.executable, True), ("python3", True)):
        spec = {"argv": [program, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "Python 3"}
        (folder / "kernel.json").write_text(json.dumps(spec))
        check = doctor.check_kernel()
        assert check.ok is ok and str(folder) in check.detail
    assert "/other/bin/python" not in check.detail
