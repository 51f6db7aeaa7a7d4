"""The collectives: what each is (`record`), and the backends that run it, one per file.

Every module here that has a tuple `BACKENDS` is found, so that a backend is added by adding its file: comm/mine.py with
a class as `Backend` says, and

    BACKENDS = (Mine("mine"),)

makes Plan("mine") and LinearPlan(backend="mine"), which planners try, and section 3 of the study measures. PLACE beside
it is where the module's come in lists of backends; without one, behind those that have one.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Protocol

import torch
import torch.distributed as dist

from maco_lib import state as states
from maco_lib.comm.nccl_symmetric import release
from maco_lib.comm.record import COLLECTIVES, DTYPES, Collective, Operation, Reference, algbw, busbw, check, collective
from maco_lib.comm.symmetric import symmetric_empty


class Backend(Protocol):
    """One way to run collectives."""

    name: str

    def unavailable(self, collective: str, device: torch.device, group: dist.ProcessGroup) -> str | None:
        """Why it cannot run here, or None."""

    def operation(
        self, name: str, numel: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup
    ) -> Operation:
        """The collective on buffers of its own. Collective."""

    def all_reduce(self, tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False) -> dist.Work | None:
        """Sum contiguous `tensor` in place on the current stream."""


def found() -> dict[str, Backend]:
    """The backends of this package's modules by name; ValueError where two have the same."""
    modules = [importlib.import_module(f"{__name__}.{entry.name}") for entry in pkgutil.iter_modules(__path__)]
    backends: dict[str, Backend] = {}
    for module in sorted((module for module in modules if hasattr(module, "BACKENDS")), key=place):
        for entry in module.BACKENDS:
            if entry.name in backends:
                raise ValueError(f"{module.__name__} has a backend {entry.name!r}, which there is already")
            backends[entry.name] = entry
    return backends


def place(module: ModuleType) -> tuple[float, str]:
    return getattr(module, "PLACE", float("inf")), module.__name__


BACKENDS = found()


def backend(name: str) -> Backend:
    """The backend called `name`; raises ValueError with the valid names."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; the backends are {', '.join(BACKENDS)}")
    return BACKENDS[name]


def all_reduce(
    tensor: torch.Tensor, backend_name: str, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> dist.Work | None:
    """Sum contiguous `tensor` in place over the ranks on the current stream, over the backend of that name. Collective.

    async_op: gloo returns its Work at once; the others are ordered by the stream and return None. The backends in
    symmetric memory need no copy for a tensor from `symmetric_empty`. From several streams they run one after the
    other, in the order in which they are issued (`turns.Turns`). Of no elements there is nothing to sum. Raises
    ValueError on an unknown backend, on a layout, type or place that it has no kernel for, and on a tensor that
    requires a gradient, but under torch.no_grad().
    """
    if not tensor.is_contiguous():
        raise ValueError(f"all_reduce needs a contiguous tensor; {tuple(tensor.shape)} has strides {tensor.stride()}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError("tensor requires a gradient and all_reduce has no backward: use torch.no_grad()")
    group = group or dist.group.WORLD
    if why := backend(backend_name).unavailable("all_reduce", tensor.device, group):
        raise ValueError(why)
    if not tensor.numel():
        return None
    turns = states.on(tensor.device).turns
    turns.take()
    work = backend(backend_name).all_reduce(tensor, group, async_op)
    turns.give()
    return work


def available(name: str, device: torch.device, group: dist.ProcessGroup) -> list[str]:
    """The backends that can run the collective `name` here, the device's default (NCCL or gloo) first."""
    collective(name)
    return [key for key, entry in BACKENDS.items() if entry.unavailable(name, device, group) is None]


__all__ = [
    "BACKENDS", "COLLECTIVES", "DTYPES", "Collective", "Operation", "Reference",
    "algbw", "all_reduce", "available", "backend", "busbw", "check", "collective",
    "release", "symmetric_empty",
]  # fmt: skip
