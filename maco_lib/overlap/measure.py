"""Measure what a `Calibration` holds: every all-reduce alone and every plan beside a few matmuls, on this machine."""

import functools
import itertools
import random
from dataclasses import dataclass

import torch
import torch.distributed as dist

from maco_lib import comm
from maco_lib.comm import symmetric
from maco_lib.overlap import execute, model, sm_limit
from maco_lib.overlap.curve import Curve
from maco_lib.overlap.plan import DEFAULT_BACKEND, Plan, overlapping
from maco_lib.stats import median_interval
from maco_lib.timing import Arm, Timing, decided, first_error, gather, interleave

KIB, MIB = 2**10, 2**20
# Where the tensor is: in symmetric memory, or anywhere else.
WHERE = ("in place", "staged")


def working_dtype(device: torch.device) -> torch.dtype:
    """The type that is measured: one that the device multiplies at full speed, which for bf16 not every one does."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@dataclass(frozen=True)
class Grid:
    """What is measured. sizes: bytes of the all-reduces alone; beside: (bytes, n of an n×n matmul), at least 3."""

    sizes: tuple[int, ...]
    beside: tuple[tuple[int, int], ...]
    budget_s: float = 0.1


GRIDS = {
    "cuda": Grid(
        (8 * KIB, *(64 * KIB * 4**step for step in range(6))),
        ((MIB, 1024), (MIB, 2048), (8 * MIB, 2048), (8 * MIB, 4096), (32 * MIB, 2048), (32 * MIB, 4096),
         (64 * MIB, 4096)),
    ),
    "cpu": Grid((64 * KIB, MIB, 8 * MIB), ((256 * KIB, 256), (MIB, 256), (MIB, 512), (4 * MIB, 512))),
}  # fmt: skip


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
        source = normal(num_bytes // working_dtype(device).itemsize, device)
        arms = []
        for (where, tensor), name in itertools.product(tensors(source, group).items(), usable):
            arms += alone(f"{name}, {where}", name, tensor, source, group)
        for label, timing in interleave(arms, group=group, device=device, budget_s=grid.budget_s).items():
            name, where = label.split(", ")
            times[where][name][num_bytes] = median_us(timing)
    curves = {
        where: {name: Curve(tuple(map(float, us)), tuple(us.values())) for name, us in of_backend.items()}
        for where, of_backend in times.items()
    }
    plans = overlapping(device.type, usable)
    plans = [plan for plan in plans if not (plan.leaves and sm_limit.unavailable(plan.leaves, device))]
    samples = [beside(plans, *size, device, group, grid.budget_s) for size in grid.beside]
    stretches = {}
    for plan in plans:
        found = [sample[plan] for sample in samples if plan in sample]
        if len(found) >= model.MIN_TRAINING_POINTS:
            stretches[plan] = model.fit(*zip(*found, strict=True))
    return curves, stretches, unusable


def median_us(timing: Timing) -> float:
    return median_interval(timing.slowest)[0]


def normal(numel: int, device: torch.device) -> torch.Tensor:
    return torch.randn(numel, device=device).to(working_dtype(device))


def tensors(source: torch.Tensor, group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    """A tensor like `source` at each of `WHERE`; without symmetric memory both are like any other."""
    users, device = torch.empty_like(source), source.device
    if symmetric.unreachable(device, group):
        return dict.fromkeys(WHERE, users)
    region = symmetric.memory(group, device).staging(symmetric.whole(source.nbytes))
    return dict(zip(WHERE, (region.base[: source.nbytes].view(source.dtype), users), strict=True))


def summing(name: str, tensor: torch.Tensor, group: dist.ProcessGroup) -> comm.Operation:
    """The all-reduce of a tensor of the user's, over the backend `name`."""
    return comm.Operation(
        "all_reduce", tensor, tensor, lambda source, result, async_op: comm.all_reduce(result, name, group, async_op)
    )


def fault(name: str, num_bytes: int, device: torch.device, group: dist.ProcessGroup) -> str:
    """Why the backend's sums cannot be trusted here, "" if they are right on every rank."""
    seed = decided(random.getrandbits(32), group)
    dtype = working_dtype(device)
    numel = num_bytes // dtype.itemsize
    reference = comm.Reference("all_reduce", numel, dtype, device, group.rank(), group.size(), seed)
    try:
        places = tensors(reference.source, group).values()
        found = [comm.check(summing(name, tensor, group), reference) for tensor in places]
    except Exception as error:  # also a compiler's that Triton does not find: the other ranks wait to be told
        found = [f"{name}: {type(error).__name__}: {error}"]
    return first_error("; ".join(filter(None, found)), group)


def alone(label: str, name: str, tensor: torch.Tensor, source: torch.Tensor, group: dist.ProcessGroup) -> list[Arm]:
    """The backend's all-reduce of `tensor`, filled from `source`; none where it takes no such tensor."""
    try:
        comm.all_reduce(tensor, name, group)
    except ValueError:
        return []
    return [Arm(label, summing(name, tensor, group).run, lambda: tensor.copy_(source))]


def beside(
    plans: list[Plan], num_bytes: int, n: int, device: torch.device, group: dist.ProcessGroup, budget_s: float
) -> dict[Plan, tuple[float, float, float]]:
    """Plan -> (t_comm, t_comp, t_overlap) in µs, with an n×n matmul; without plans whose backend takes fewer bytes."""
    a, b = (normal(n * n, device).view(n, n) for _ in range(2))
    product, source = torch.empty_like(a), normal(num_bytes // a.itemsize, device)
    tensor = tensors(source, group)[WHERE[0]]

    def compute() -> None:
        torch.mm(a, b, out=product)

    arms = [Arm("compute", compute)]
    for name in dict.fromkeys(plan.backend for plan in plans):
        arms += alone(name, name, tensor, source, group)
    taken = {arm.name for arm in arms}
    plans = [plan for plan in plans if plan.backend in taken]
    for plan in plans:
        all_reduce = summing(plan.backend, tensor, group).run
        run = functools.partial(execute.run_plan, plan, compute, all_reduce, tensor)
        arms.append(Arm(str(plan), run, lambda: tensor.copy_(source)))
    timings = interleave(arms, group=group, device=device, budget_s=budget_s)
    t_comp = median_us(timings["compute"])
    return {plan: (median_us(timings[plan.backend]), t_comp, median_us(timings[str(plan)])) for plan in plans}


def in_symmetric_memory(tensor: torch.Tensor, group: dist.ProcessGroup) -> bool:
    """Whether `tensor` is in symmetric memory, where most backends sum it without a copy."""
    return tensor.device.type == "cuda" and symmetric.memory(group, tensor.device).find(tensor) is not None
