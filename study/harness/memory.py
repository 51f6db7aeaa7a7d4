"""Refuse sizes that cannot fit before anything is started."""

from study.harness.machine import Machine

BYTES_PER_ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}
FILL = 0.8
GIB = 2**30


def require(what: str, bytes_per_rank: float, machine: Machine, num_ranks: int) -> None:
    """Raise ValueError naming `what` unless it fits: every rank has a GPU's memory, or all share the host's."""
    sharing = 1 if machine.kind == "cuda" else num_ranks
    needed, there = sharing * bytes_per_rank, machine.memory_bytes
    if needed > FILL * there:
        where = "of one GPU" if machine.kind == "cuda" else f"shared by {num_ranks} ranks"
        raise ValueError(f"{what} needs {needed / GIB:.1f} GiB, over {FILL:.0%} of the {there / GIB:.1f} GiB {where}")


def resolve_ranks(num_ranks: int | None, machine: Machine) -> int:
    """The asked number of ranks; None: every GPU, or 2 on a CPU."""
    return num_ranks or (machine.num_devices if machine.kind == "cuda" else 2)


def too_few_ranks(parameters, machine: Machine) -> str | None:
    """Why a section that communicates cannot run here, or None."""
    num_ranks = resolve_ranks(parameters.num_ranks, machine)
    return None if num_ranks >= 2 else f"needs at least 2 ranks to communicate; there is {num_ranks} on {machine.name}"
