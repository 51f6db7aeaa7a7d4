"""What the tables of section 1 share: sizes of a published configuration, names of methods, columns."""

import pandera.pandas as pa

from study.harness.machine import Machine
from study.harness.memory import BYTES_PER_ELEMENT, require, resolve_ranks
from study.harness.spec import Parameters
from study.sections.overlap.methods import METHODS, PUBLISHED, SWEEP

TIME = pa.Column(float, pa.Check.gt(0), nullable=True)
RATIO = pa.Column(float, nullable=True)
COMMON = {
    "point_key": pa.Column(str),
    "configuration": pa.Column(str, pa.Check.isin([*PUBLISHED, SWEEP])),
    "comm_bytes": pa.Column(int, pa.Check.gt(0)),
    "matmul_n": pa.Column(int, pa.Check.gt(0)),
    "dtype": pa.Column(str, pa.Check.isin(list(BYTES_PER_ELEMENT))),
    "num_ranks": pa.Column(int, pa.Check.ge(2)),
    "num_launches": pa.Column(int, pa.Check.ge(1)),
    "error": pa.Column(str),
}


def sizes(parameters: Parameters, name: str) -> tuple[int, int]:
    """(comm_bytes, matmul_n) of a published configuration; raises ValueError with the valid names."""
    if name not in PUBLISHED:
        raise ValueError(f"unknown configuration {name!r}; the published ones are {'; '.join(PUBLISHED)}")
    comm_bytes, matmul_n = PUBLISHED[name]
    return comm_bytes // parameters.shrink**2, matmul_n // parameters.shrink


def check_sizes(parameters: Parameters, machine: Machine, comm_bytes: int, matmul_n: int) -> None:
    """Raise ValueError on sizes that mean nothing or do not fit into memory."""
    itemsize = BYTES_PER_ELEMENT[parameters.dtype]
    if comm_bytes < 16 or comm_bytes % 16:
        raise ValueError(f"comm_bytes = {comm_bytes} is not a positive multiple of 16 bytes")
    if matmul_n < 1:
        raise ValueError(f"matmul_n = {matmul_n} is below 1")
    # Buffers of all backends and the reference in wider types; three matrices and one of them in float64.
    needed = comm_bytes * (16 + 20 / itemsize) + matmul_n**2 * (3 * itemsize + 8)
    ranks = resolve_ranks(parameters.num_ranks, machine)
    require(f"comm_bytes = {comm_bytes} with matmul_n = {matmul_n}", needed, machine, ranks)


def check_methods(asked: list[str]) -> str:
    """The methods of a point as it names them; raises ValueError with the valid ones."""
    for name in asked:
        if name not in METHODS["device"]:
            raise ValueError(f"unknown method {name!r}; the methods are {', '.join(METHODS['device'])}")
    if "sequential" not in asked or len(set(asked)) < len(asked):
        raise ValueError(f"methods = {asked}: each is named once, 'sequential' among them to judge the others against")
    return ",".join(asked)
