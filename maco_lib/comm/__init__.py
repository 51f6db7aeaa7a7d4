"""The collectives: what each is (`record`), and the backends that run it, one per file.

A backend has `name`, `needs`, `unavailable(collective, device, group) -> why or None` and
`operation(collective, numel, dtype, device, group) -> Operation`.
"""

import torch
import torch.distributed as dist

from maco_lib.comm.gloo import Gloo
from maco_lib.comm.nccl import Nccl
from maco_lib.comm.record import COLLECTIVES, DTYPES, Collective, Operation, Reference, algbw, busbw, check, collective
from maco_lib.comm.symm_mem import SymmetricMemory

BACKENDS = {
    backend.name: backend
    for backend in (
        Nccl("nccl"),
        Nccl("nccl_cta4", max_ctas=4),
        Nccl("nccl_cta8", max_ctas=8),
        SymmetricMemory("symm_mem_one_shot", shots=1),
        SymmetricMemory("symm_mem_two_shot", shots=2),
        Gloo(),
    )
}


def backend(name: str) -> Nccl | SymmetricMemory | Gloo:
    """The backend called `name`; raises ValueError with the valid names."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; the backends are {', '.join(BACKENDS)}")
    return BACKENDS[name]


def available(name: str, device: torch.device, group: dist.ProcessGroup) -> list[str]:
    """The backends that can run the collective `name` here, the device's default (NCCL or gloo) first."""
    collective(name)
    return [key for key, entry in BACKENDS.items() if entry.unavailable(name, device, group) is None]


__all__ = [
    "BACKENDS", "COLLECTIVES", "DTYPES", "Collective", "Operation", "Reference",
    "algbw", "available", "backend", "busbw", "check", "collective",
]  # fmt: skip
