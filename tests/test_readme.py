"""The README's example runs as printed, and what the README points at is there."""

import json
import pathlib
import re
import subprocess
import sys

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]
README = (CHECKOUT / "README.md").read_text()


def test_example_runs_under_torchrun(tmp_path, monkeypatch):
    (example,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    (tmp_path / "example.py").write_text(example)
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"rank {rank} of 2 on" in done.stdout


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (CHECKOUT / link).exists()] == []


def test_commands_are_those_of_the_command_line():
    described = re.findall(r"^ +python -m study ([\w-]+)  ", README, re.MULTILINE)
    done = subprocess.run([sys.executable, "-m", "study", "--help"], cwd=CHECKOUT, capture_output=True, text=True)
    (offered,) = re.findall(r"^  \{(.*)\}$", done.stdout, re.MULTILINE)
    assert described == offered.split(",")


def test_what_the_planner_reaches_is_read_from_its_data():
    summary = json.loads((CHECKOUT / "data" / "auto_pairs" / "h200-x2.json").read_text())["summary"]
    text = " ".join(README.split())
    assert f"at {summary['num_pairs']} pairs of sizes" in text
    assert f"at worst {summary['worst_ratio']:.2f} times as slow as the best" in text
    assert f"and {summary['worst_back_to_back_ratio']:.2f} times where calls follow" in text
