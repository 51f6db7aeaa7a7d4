"""Matmul and all-reduce in one launch: the tiles of the result are summed over the ranks as they are finished.

A persistent CUDA kernel (`persistent.cu`, `stages.cuh`) for Hopper: TMA loads shared by clusters of two CTAs, wgmma,
and warps of their own for loading, storing and fetching. Each rank computes first the tiles that others own, whose
partials these fetch; then its own, to which it adds the partials fetched from the others, and whose sums the others
fetch. All transfers are bulk reads, a box at a time: they take no SM, and the loads of the matmul go on beside them.
(They did not beside stores to a peer, bulk or ordinary ones, which held them up for as long as they took.) What is left
after the last multiplication is to fetch the sums of the last tiles.

CUDA and not Triton: Triton 3.6 neither shares loads within a cluster nor specialises warps on Hopper, and its bulk
stores cannot be waited for, which flags between ranks need. Compiled by NVRTC, which torch brings along, at the first
call for a type and tile.
"""

import ctypes
import dataclasses
import os
import pathlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from maco_lib.kernels import compiled
from maco_lib.kernels.compiled import SHARED_BYTES, Maps, wgmma
from maco_lib.kernels.launch import Launch, Launches
from maco_lib.kernels.patience import code
from maco_lib.kernels.tile_order import CTAS, TileOrder

FOLDER = pathlib.Path(__file__).parent
SOURCES = tuple(FOLDER / name for name in ("clock.cuh", "patience.cuh", "hopper.cuh", "stages.cuh", "persistent.cu"))
BM, BK = 128, 64
NUM_THREADS = 384
BOX_ROWS, BOX_COLUMNS = 64, 32
BOX_BYTES = BOX_ROWS * BOX_COLUMNS * 2
MIN_FETCH_BUFFERS, MAX_FETCH_BUFFERS = 4, 16
# What a trace tells of each CTA's n-th tile, and (the last two) of the n-th tile that it fetches.
EVENTS = ("multiply", "multiplied", "added", "stored", "fetch", "fetched")
TRACE_TILES = 128


@dataclass(frozen=True)
class Constants:
    """What the kernel is compiled for.

    bn: columns of a tile, a multiple of 32; width: tiles multiplied at once, 1 or 2; width * bn is at most 256. strict:
    tiles are handed over behind a fence of the system's scope, which PTX asks for; else of the GPU's, which is cheaper,
    and why it is enough stands in persistent.cu.
    """

    bn: int
    width: int
    rank: int
    num_ranks: int
    dtype: torch.dtype
    has_bias: bool
    has_residual: bool
    trace: bool = False
    strict: bool = False

    @property
    def fixed_bytes(self) -> int:
        """Shared memory beside stages and fetch buffers: alignment, the outgoing tile, barriers."""
        return 1024 + BM * self.width * self.bn * 2 + 512

    @property
    def stage_bytes(self) -> int:
        return (BM + self.width * self.bn) * BK * 2

    @property
    def num_stages(self) -> int:
        return (SHARED_BYTES - self.fixed_bytes - MIN_FETCH_BUFFERS * BOX_BYTES) // self.stage_bytes

    @property
    def fetch_buffers(self) -> int:
        rest = SHARED_BYTES - self.fixed_bytes - self.num_stages * self.stage_bytes
        return min(MAX_FETCH_BUFFERS, rest // BOX_BYTES // 2 * 2)

    @property
    def shared_bytes(self) -> int:
        return self.fixed_bytes + self.num_stages * self.stage_bytes + self.fetch_buffers * BOX_BYTES

    def source(self) -> str:
        """The kernel's source with these constants."""
        instructions = {f"WGMMA_{width}": wgmma(width * self.bn, self.dtype) for width in range(1, self.width + 1)}
        constants = {
            "BN": self.bn, "WIDTH": self.width, "STAGES": self.num_stages, "RANKS": self.num_ranks, "RANK": self.rank,
            "FETCH_BUFFERS": self.fetch_buffers, "BF16": int(self.dtype == torch.bfloat16),
            "HAS_BIAS": int(self.has_bias),
            "HAS_RESIDUAL": int(self.has_residual), "TRACE": int(self.trace), "TRACE_TILES": TRACE_TILES,
            "WGMMA_2": "", "WHO": code("persistent"), "STRICT": int(self.strict), **instructions,
        }  # fmt: skip
        return compiled.defines(constants) + "".join(path.read_text(encoding="utf-8") for path in SOURCES)


def asked_strict() -> bool:
    """Whether kernels that are prepared from now on take no short cut in the order of memory: MACO_STRICT=1."""
    return os.environ.get("MACO_STRICT", "0") != "0"


@dataclass(frozen=True)
class Addresses:
    """Where tiles and flags lie, by rank; as in persistent.cu, `watch` as in patience.cuh."""

    partials: tuple[int, ...]
    sums: tuple[int, ...]
    flags: tuple[int, ...]
    inbox: int
    area_bytes: int
    watch: int

    def packed(self) -> ctypes.Array:
        values = [*self.partials, *self.sums, *self.flags, self.inbox, self.area_bytes, self.watch]
        return (ctypes.c_uint64 * len(values))(*values)


@dataclass(frozen=True)
class Schedule:
    """A rank's `TileOrder.tables`, on its GPU."""

    work_begin: torch.Tensor
    works: torch.Tensor
    fetch_begin: torch.Tensor
    fetches: torch.Tensor

    @classmethod
    def of(cls, order: TileOrder, rank: int, device: torch.device) -> "Schedule":
        """Made on the host and copied: not while a graph is captured."""
        return cls(*(torch.tensor(part, device=device) for part in order.tables(rank)))


def persistent(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    result: torch.Tensor,
    bn: int,
    order: TileOrder,
    schedule: Schedule,
    addresses: Addresses,
    rank: int,
    launches: Launches,
    together: Callable[[Hashable], None] = lambda key: None,
    trace: torch.Tensor | None = None,
    strict: bool | None = None,
) -> None:
    """Fill `result` on the current stream. Collective.

    x: (M, K), weight: (N, K), bf16 or fp16, rows contiguous, addresses and pitches multiples of 16 bytes; bias:
    (N,), residual, result: (M, N), contiguous. bn: columns of a tile, a multiple of 32 up to 256, or 128 where the
    order has pairs. order: of the result's tiles; schedule: its tables for this rank. launches: those prepared;
    together: as of an `inbox.Box`. trace: None, or int64 (CTAs, TRACE_TILES, len(EVENTS)), zeroed, where the kernel
    leaves the time in ns of `EVENTS` for each CTA's n-th tile or fetch. strict: as of `Constants`; None: as MACO_STRICT
    says when the launch is prepared.
    """
    key = (
        x.shape, weight.shape, x.stride(0), weight.stride(0), x.dtype, bn, order, addresses,
        bias is None, residual is None, trace is None, strict,
    )  # fmt: skip
    prepared = launches.get(key)
    if prepared is None:
        constants = Constants(
            bn, 2 if order.in_pairs else 1, rank, order.num_ranks, x.dtype, bias is not None, residual is not None,
            trace is not None, asked_strict() if strict is None else strict,
        )  # fmt: skip
        source, shared_bytes = constants.source(), constants.shared_bytes
        kernel = compiled.function(source, "persistent_kernel", shared_bytes, x.device.index)
        together(("persistent", dataclasses.replace(constants, rank=0)))
        tables = (schedule.work_begin, schedule.works, schedule.fetch_begin, schedule.fetches)
        sizes = map(ctypes.c_int32, (-(-x.shape[1] // BK), *result.shape))
        places, unset = [ctypes.c_uint64() for _ in range(3)], (ctypes.c_uint64 * 16)()
        launch = Launch(
            int(kernel), order.num_clusters * CTAS, NUM_THREADS, shared_bytes,
            [*[unset] * 4, addresses.packed(), *(ctypes.c_uint64(table.data_ptr()) for table in tables), *sizes,
             *places],
            x.device.index,
        )  # fmt: skip
        maps = [Maps(launch, index) for index in range(4)]
        boxes = [(BM, BK), (bn // CTAS, BK), (constants.width * bn // CTAS, BK), (BOX_ROWS, BOX_COLUMNS)]
        prepared = launches.keep(key, (launch, maps, boxes, places, schedule))
    launch, maps, boxes, places, _ = prepared
    for operand, tensor_maps, box in zip((x, weight, weight, result), maps, boxes, strict=True):
        tensor_maps.set(operand, *box)
    for place, tensor in zip(places, (bias, residual, trace), strict=True):
        place.value = 0 if tensor is None else tensor.data_ptr()
    launch()
