"""Matmul and all-reduce in one launch: the tiles of the result are summed over the ranks as they are finished.

A persistent CUDA kernel (`persistent.cu`, `stages.cuh`) for Hopper: TMA loads shared by clusters of two CTAs, wgmma,
and warps of their own for loading, storing and fetching. Each rank computes first the tiles that others own, whose
partials these fetch; then its own, to which it adds the partials fetched from the others, and whose sums the others
fetch. All transfers are bulk reads, a box at a time: they take no SM, and the loads of the matmul go on beside them.
(They did not beside bulk stores to a peer, which held them up for as long as they took.) What is left after the last
multiplication is to fetch the sums of the last tiles.

CUDA and not Triton: Triton 3.6 neither shares loads within a cluster nor specialises warps on Hopper, and its bulk
stores cannot be waited for, which flags between ranks need. Compiled by NVRTC, which torch brings along, at the first
call for a type and tile.
"""

import ctypes
import functools
import pathlib
from dataclasses import dataclass

import torch
from cuda.bindings import driver, nvrtc

from maco_lib.kernels.tile_order import CTAS, TileOrder

FOLDER = pathlib.Path(__file__).parent
SOURCES = (FOLDER / "hopper.cuh", FOLDER / "stages.cuh", FOLDER / "persistent.cu")
BM, BK = 128, 64
NUM_THREADS = 384
BOX_ROWS, BOX_COLUMNS = 64, 32
BOX_BYTES = BOX_ROWS * BOX_COLUMNS * 2
MIN_FETCH_BUFFERS, MAX_FETCH_BUFFERS = 4, 16
SHARED_BYTES = 227 * 1024
# What a trace tells of each CTA's n-th tile, and (the last two) of the n-th tile that it fetches.
EVENTS = ("multiply", "multiplied", "added", "stored", "fetch", "fetched")
TRACE_TILES = 128
DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
ELEMENTS = {
    torch.bfloat16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    torch.float16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
}


def checked(answer: tuple) -> object:
    """What a call of the driver or NVRTC returned; RuntimeError with its error code."""
    error, *values = answer
    if int(error) != 0:
        raise RuntimeError(f"{type(error).__name__} {error.name}")
    return values[0] if len(values) == 1 else values


@dataclass(frozen=True)
class Constants:
    """What the kernel is compiled for.

    bn: columns of a tile, a multiple of 32; width: tiles multiplied at once, 1 or 2; width * bn is at most 256.
    """

    bn: int
    width: int
    rank: int
    num_ranks: int
    dtype: torch.dtype
    has_bias: bool
    has_residual: bool
    trace: bool = False

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

    def wgmma(self, columns: int) -> str:
        """A warpgroup's instruction: 64 rows by `columns`, 16 deep."""
        registers, kind = columns // 2, DTYPES[self.dtype]
        outputs = ", ".join(f"%{index}" for index in range(registers))
        operands = ", ".join(f'"+f"(sum[{index}])' for index in range(registers))
        return (
            f'asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{registers + 2}, 0; '
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} "
            f'{{{outputs}}}, %{registers}, %{registers + 1}, p, 1, 1, 0, 0; }}" '
            f': {operands} : "l"(a), "l"(b), "r"(add))'
        )

    def source(self) -> str:
        """The kernel's source with these constants."""
        wgmma = {f"WGMMA_{width}": self.wgmma(width * self.bn) for width in range(1, self.width + 1)}
        constants = {
            "BN": self.bn, "WIDTH": self.width, "STAGES": self.num_stages, "RANKS": self.num_ranks, "RANK": self.rank,
            "FETCH_BUFFERS": self.fetch_buffers, "BF16": int(self.dtype == torch.bfloat16),
            "HAS_BIAS": int(self.has_bias),
            "HAS_RESIDUAL": int(self.has_residual), "TRACE": int(self.trace), "TRACE_TILES": TRACE_TILES,
            "WGMMA_2": "", **wgmma,
        }  # fmt: skip
        defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
        return defines + "".join(path.read_text() for path in SOURCES)


def cubin(source: str) -> bytes:
    """The source compiled for Hopper; RuntimeError with the compiler's log."""
    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"persistent.cu", 0, None, None))
    options = [b"--gpu-architecture=sm_90a", b"-std=c++17"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(error) != 0:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"persistent.cu: {log.decode()}")
    binary = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, binary))
    return binary


@functools.cache
def function(constants: Constants, device_index: int) -> object:
    """The kernel, compiled and loaded; RuntimeError while a graph is captured."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the persistent kernel cannot be compiled while a graph is captured: call before")
    with torch.cuda.device(device_index):
        torch.cuda.current_stream().synchronize()  # makes the context
        module = checked(driver.cuModuleLoadData(cubin(constants.source())))
        loaded = checked(driver.cuModuleGetFunction(module, b"persistent_kernel"))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(loaded, attribute, constants.shared_bytes))
    return loaded


@functools.lru_cache(maxsize=4096)
def tensor_map(address: int, num_rows: int, num_columns: int, pitch: int, box_rows: int, box_columns: int, dtype):
    """How TMA reads or writes boxes of a row-major matrix; pitch: elements from row to row."""
    swizzle = driver.CUtensorMapSwizzle
    return checked(
        driver.cuTensorMapEncodeTiled(
            ELEMENTS[dtype], 2, address,
            [driver.cuuint64_t(num_columns), driver.cuuint64_t(num_rows)], [driver.cuuint64_t(pitch * 2)],
            [driver.cuuint32_t(box_columns), driver.cuuint32_t(box_rows)], [driver.cuuint32_t(1)] * 2,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle.CU_TENSOR_MAP_SWIZZLE_128B if box_columns == BK else swizzle.CU_TENSOR_MAP_SWIZZLE_64B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Addresses:
    """Where tiles and flags lie, by rank; as in persistent.cu."""

    partials: list[int]
    sums: list[int]
    flags: list[int]
    inbox: int
    area_bytes: int

    def packed(self) -> ctypes.Array:
        values = [*self.partials, *self.sums, *self.flags, self.inbox, self.area_bytes]
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
    trace: torch.Tensor | None = None,
) -> None:
    """Fill `result` on the current stream. Collective.

    x: (M, K), weight: (N, K), bf16 or fp16, rows contiguous, addresses and pitches multiples of 16 bytes; bias:
    (N,), residual, result: (M, N), contiguous. bn: columns of a tile, a multiple of 32 up to 256, or 128 where the
    order has pairs. order: of the result's tiles; schedule: its tables for this rank. trace: None, or int64 (CTAs,
    TRACE_TILES, len(EVENTS)), zeroed, where the kernel leaves the time in ns of `EVENTS` for each CTA's n-th tile
    or fetch.
    """
    constants = Constants(
        bn, 2 if order.pair_waves else 1, rank, order.num_ranks, x.dtype, bias is not None, residual is not None,
        trace is not None,
    )  # fmt: skip
    kernel = function(constants, x.device.index)
    maps = (
        tensor_map(x.data_ptr(), *x.shape, x.stride(0), BM, BK, x.dtype),
        *(
            tensor_map(weight.data_ptr(), *weight.shape, weight.stride(0), width * bn // CTAS, BK, x.dtype)
            for width in (1, constants.width)
        ),
        tensor_map(result.data_ptr(), *result.shape, result.stride(0), BOX_ROWS, BOX_COLUMNS, x.dtype),
    )
    packed = addresses.packed()
    tables = (schedule.work_begin, schedule.works, schedule.fetch_begin, schedule.fetches)
    pointer = lambda tensor: ctypes.c_uint64(0 if tensor is None else tensor.data_ptr())  # noqa: E731
    scalars = [
        *map(pointer, tables),
        *(ctypes.c_int32(number) for number in (-(-x.shape[1] // BK), *result.shape)),
        *map(pointer, (bias, residual, trace)),
    ]
    pointers = [int(each.getPtr()) for each in maps]
    pointers += [ctypes.addressof(each) for each in (packed, *scalars)]
    arguments = (ctypes.c_void_p * len(pointers))(*pointers)
    checked(
        driver.cuLaunchKernel(
            kernel, order.num_clusters * CTAS, 1, 1, NUM_THREADS, 1, 1, constants.shared_bytes,
            torch.cuda.current_stream(x.device).cuda_stream, ctypes.addressof(arguments), 0,
        )
    )  # fmt: skip
