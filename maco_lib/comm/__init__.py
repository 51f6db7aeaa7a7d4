"""The collectives: what each is (`record`), and the backends that run it, one per file.

A backend has `name`, `needs`, `unavailable(collective, device, group) -> why or None` and
`operation(collective, numel, dtype, device, group) -> Operation`, and for the caller's own tensor
`all_reduce(tensor, group, async_op)`.
"""

import torch
import torch.distributed as dist

from maco_lib import state as states
from maco_lib.comm.gloo import Gloo
from maco_lib.comm.mailed import LL128, OneShotLines
from maco_lib.comm.nccl import Nccl
from maco_lib.comm.nccl_symmetric import NcclSymmetric, release
from maco_lib.comm.one_shot import PullOneShot
from maco_lib.comm.record import COLLECTIVES, DTYPES, Collective, Operation, Reference, algbw, busbw, check, collective
from maco_lib.comm.staged import Staged
from maco_lib.comm.symm_mem import OneShot, TwoShot
from maco_lib.comm.symmetric import SymmetricAllReduce, symmetric_empty
from maco_lib.comm.two_shot import PullTwoShot, PushTwoShot
from maco_lib.comm.vllm_custom import VllmCustom

BACKENDS = {
    backend.name: backend
    for backend in (
        Nccl("nccl"),
        Nccl("nccl_cta4", max_ctas=4),
        Nccl("nccl_cta8", max_ctas=8),
        NcclSymmetric("nccl_symmetric"),
        OneShot("symm_mem_one_shot"),
        TwoShot("symm_mem_two_shot"),
        PullTwoShot("maco_pull_8", num_ctas=8),
        PushTwoShot("maco_push_64", num_ctas=64),
        PushTwoShot("maco_push_128", num_ctas=128),
        Staged("maco_staged_8", num_ctas=8),
        Staged("maco_staged_12", num_ctas=12),
        OneShotLines("maco_ll"),
        LL128("maco_ll128"),
        PullOneShot("maco_one_shot_64"),
        VllmCustom("vllm_custom"),
        Gloo(),
    )
}


Backend = Nccl | NcclSymmetric | Gloo | SymmetricAllReduce


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
