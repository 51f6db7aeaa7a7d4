"""A backend, a technique and a figure are each added by one file, which everything that is to know of it finds."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from ranks import ROOT
from test_sections_alone import alone

from maco_lib import comm
from maco_lib.linear.techniques import techniques
from study.harness.machine import Machine
from study.report import figures
from study.sections.bandwidth.section import BANDWIDTH, SECTION

TOY_BACKEND = '''
"""Every rank gathers all copies and adds them up."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from maco_lib.comm.record import Operation


@dataclass(frozen=True)
class Toy:
    name: str = "toy"

    def unavailable(self, collective, device, group):
        return None if (collective, device.type) == ("all_reduce", "cpu") else "toy is an all-reduce of CPU ranks"

    def operation(self, name, numel, dtype, device, group):
        tensor = torch.empty(numel, dtype=dtype, device=device)
        return Operation(name, tensor, tensor, lambda source, result, async_op: self.all_reduce(result, group))

    def all_reduce(self, tensor, group, async_op=False):
        copies = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(copies, tensor, group=group)
        tensor.copy_(torch.stack(copies).sum(0))


BACKENDS = (Toy(),)
'''

WITH_THE_BACKEND = """
import pandas as pd

from maco_lib import comm
from maco_lib.linear.plan import LinearPlan
from maco_lib.overlap import Plan, linear_all_reduce, overlap
from study.drawing import looks
from study.harness.worker import Context
from study.sections.bandwidth import figures, measure

rank, group = begin()
assert comm.available("all_reduce", cpu, group) == ["gloo", "toy"] and list(comm.BACKENDS)[-1] == "toy"
for plan in (Plan("toy"), Plan("toy", compute_first=True), Plan("toy", overlapped=False)):
    product, total = overlap(lambda: torch.ones(8, 8) @ torch.ones(8, 8), torch.full((1000,), rank + 1.0), plan=plan)
    assert (product == 8).all() and (total == 3).all(), plan
for plan in (LinearPlan(backend="toy"), LinearPlan("chunked", "toy", 2)):
    assert (linear_all_reduce(torch.ones(300, 4), torch.ones(6, 4), plan=plan) == 8).all(), plan

# Section 3, at a point as its profiles have them.
point = {"collective": "all_reduce", "bytes": 2**16, "dtype": "bf16", "budget_s": 0.01, "min_iterations": 5}
result = measure.measure(point, Context(rank, 2, cpu, group, folder / "events"))
rows = pd.DataFrame(result.rows)
assert rows["backend"].tolist() == ["gloo", "toy"] and rows["correct"].all(), rows["error"].tolist()
assert looks.look("toy").label == "toy"
if rank == 0:
    figure, numbers = figures.busbw({"bandwidth": rows}, "cpu-2")
    assert set(numbers["backend"]) == {"gloo", "toy"}
"""

TOY_TECHNIQUE = '''
"""The columns in two halves, one after the other."""

from maco_lib.linear.techniques.technique import Technique


def run(problem, plan):
    half = problem.result.shape[1] // 2
    for block in problem.blocks([(slice(None), slice(0, half)), (slice(None), slice(half, None))]):
        problem.multiply(block)
        problem.sum(block)
        problem.finish(block)


TECHNIQUE = Technique("toy", run, candidates=lambda kind, backends: [f"toy:{name}" for name in backends])
'''

WITH_THE_TECHNIQUE = """
from maco_lib.linear.plan import LinearPlan, candidates
from maco_lib.overlap import linear_all_reduce, tune_linear

rank, group = begin()
assert LinearPlan.parse("toy") == LinearPlan("toy") and LinearPlan.parse("toy:gloo") == LinearPlan("toy", "gloo")
assert candidates("cpu", ["gloo"])[-1] == LinearPlan.parse("toy:gloo")
own, shared = torch.Generator().manual_seed(rank), torch.Generator().manual_seed(7)
x, weight = (torch.randn(size, 64, generator=own) for size in (20, 30))
bias, residual = torch.randn(30, generator=shared), torch.randn(20, 30, generator=shared)
expected = linear_all_reduce(x, weight, bias, residual, plan=None)
for _ in range(2):
    torch.testing.assert_close(linear_all_reduce(x, weight, bias, residual, plan=LinearPlan("toy")), expected)
decision = tune_linear(weight, [20], budget_s=0.01)[20]
assert 0 < decision.measured_us[LinearPlan("toy", "gloo")] < float("inf")
"""

ON_A_RANK = """
import atexit, datetime, os, pathlib, sys
import torch
import torch.distributed as dist

folder, cpu = pathlib.Path(sys.argv[1]), torch.device("cpu")


def begin():
    '(rank, group) in each of two ranks: this process and one like it.'
    child = os.fork()
    rank = int(child == 0)
    if child:
        atexit.register(lambda: os.waitpid(child, 0)[1] and os._exit(1))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/ranks", datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
    return rank, dist.group.WORLD
"""

TOY_FIGURE = """
from matplotlib.figure import Figure

from study.drawing import style
from study.drawing.figure import FigureSpec


def toy(tables, machine_name):
    figure = style.new(style.NARROW_IN, 2.0)
    figure.subplots().plot(tables["bandwidth"]["bytes"], tables["bandwidth"]["time_us"], ".")
    return figure, tables["bandwidth"][["bytes", "time_us"]]


FIGURES = (FigureSpec("bandwidth_toy", "bandwidth", ("bandwidth",), "Times of everything.", toy),)
"""

WITH_THE_FIGURE = """
import pathlib, sys

from study.commands import notebook
from study.report import figures, report

assert figures.of_section("bandwidth") == ["bandwidth_busbw", "bandwidth_published", "bandwidth_toy"]
problems = report.build(pathlib.Path(sys.argv[1]))
assert problems == [], problems
run = notebook.begin("bandwidth", machine="cpu-2")
run.complete()
assert run.shown == figures.of_section("bandwidth") and run.undrawn == []
"""


def copy_of(code: pathlib.Path, path: str, added: str) -> pathlib.Path:
    """The code of the checkout in a folder of its own, with one file more."""
    for package in ("maco_lib", "study"):
        shutil.copytree(ROOT / package, code / package)
    (code / path).write_text(added)
    return code


def succeeds(copy: pathlib.Path, program: str, folder: pathlib.Path) -> None:
    """Run it with the code of the copy and what is stored in `folder`, which is its argument."""
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "MACO_ROOT": str(folder)}
    command = [sys.executable, "-c", program, str(folder)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=copy, env=environment, timeout=100, **output)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_one_file_adds_a_backend_a_technique_or_a_figure(tmp_path):
    """Each in a copy of its own, of which nothing else is changed."""
    backend = copy_of(tmp_path / "backend", "maco_lib/comm/toy.py", TOY_BACKEND)
    succeeds(backend, ON_A_RANK + WITH_THE_BACKEND, backend)
    technique = copy_of(tmp_path / "technique", "maco_lib/linear/techniques/toy.py", TOY_TECHNIQUE)
    succeeds(technique, ON_A_RANK + WITH_THE_TECHNIQUE, technique)
    figure = copy_of(tmp_path / "figure", "study/sections/bandwidth/figure_toy.py", TOY_FIGURE)
    store = alone(tmp_path / "stored", "cpu-2", "bandwidth")
    succeeds(figure, WITH_THE_FIGURE, store.root)
    assert (store.figures / "cpu-2" / "bandwidth_toy.png").stat().st_size > 0
    text = (store.root / "REPORT.md").read_text(encoding="utf-8")
    assert "![bandwidth_toy, cpu-2](figures/cpu-2/bandwidth_toy.png)\n\n*cpu-2: Times of everything.*" in text
    assert text.index("![bandwidth_published") < text.index("![bandwidth_toy") < text.index("\n## 4.")
    assert "| bandwidth_toy | notebooks/03_bandwidth.ipynb |" in text  # the list of every figure


BACKENDS = """
    nccl nccl_cta4 nccl_cta8 nccl_symmetric symm_mem_one_shot symm_mem_two_shot maco_pull_8 maco_push_64 maco_push_128
    maco_staged_8 maco_staged_12 maco_ll maco_ll128 maco_one_shot_64 vllm_custom gloo
"""
FIGURES = """
    environment_ceilings overlap_published overlap_techniques overlap_sm_sharing overlap_synchronisation overlap_heatmap
    overlap_timeline inference_latency inference_attribution inference_batch bandwidth_busbw bandwidth_published
    when_map when_prediction when_models linear_fraction linear_speedup linear_chain linear_timeline
"""


def test_what_there_is_has_its_order():
    assert [entry.name for entry in comm.BACKENDS.values()] == list(comm.BACKENDS) == BACKENDS.split()
    assert list(techniques()) == ["sequential", "chunked", "persistent", "decode"]
    assert list(figures.FIGURES) == FIGURES.split()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_section_3_names_no_backends_so_it_measures_all_that_work(kind):
    machine = Machine(kind, 2, "some", "0" * 16, 2**38, {})
    for profile, choices in SECTION.profiles.items():
        for sized in choices[kind]:
            points = BANDWIDTH.points(SECTION.resolve(profile, machine, sized=sized), machine)
            assert points and not any("backends" in point for point in points)
