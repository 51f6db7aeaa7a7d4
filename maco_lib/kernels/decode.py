"""A matmul of few rows, at the pace at which its weight can be read, that sends its product to the peers.

What a row-parallel layer does at the sizes of decoding is to read its weight; the product is small. A CUDA kernel
(`decode.cu`, `decode_stages.cuh`) for Hopper: every CTA takes as many of the weight's rows as there are for each, a
multiple of 8 and seldom the 64 that wgmma multiplies at a time (tensor cores are idle here anyway), and the whole of K,
so there is nothing to be added up between CTAs. TMA reads many stages ahead; x's rows, which all need, come once for a
cluster. The product is summed in float32 in one order and rounded once; it goes to all inboxes, in lines
(`kernels.lines`), straight from the CTA that has it. `kernels.sum_norm` or `one_shot.take_sum` takes it from there.
Either is launched before this kernel has ended, and this one before the one in front of it has.
"""

import ctypes
import functools
import pathlib
from dataclasses import dataclass

import torch
from cuda.bindings import driver

from maco_lib.kernels import compiled
from maco_lib.kernels.compiled import SHARED_BYTES, Maps, wgmma
from maco_lib.kernels.decode_tiles import MAX_ROWS, MAX_TILE_ROWS, padded_rows, tile_rows_of
from maco_lib.kernels.inbox import HALF_BYTES, LINE_BYTES, MAX_CTAS, Box
from maco_lib.kernels.launch import Launch

FOLDER = pathlib.Path(__file__).parent
SOURCES = (FOLDER / "hopper.cuh", FOLDER / "decode_stages.cuh", FOLDER / "decode.cu")
DTYPES = tuple(compiled.DTYPES)
# Columns of a box.
BK = 64
MAX_STAGES = 32
NUM_THREADS = 320
# For the kernel that follows and is there before this one has ended.
LEFT_BYTES = 4 * 1024
# What the L2 cache reads at a time: a row of a box, and no more.
PROMOTION = driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B
# Elements from row to row: TMA wants multiples of 16 bytes.
MULTIPLE = 8


@dataclass(frozen=True)
class Constants:
    """What the kernel is compiled for.

    padded_rows: x's, 8, 16, 32 or 64; cluster: CTAs that share x's; boxes: of 64 columns in a stage, a multiple of it.
    """

    padded_rows: int
    cluster: int
    boxes: int
    num_ranks: int
    dtype: torch.dtype

    def fixed_bytes(self, tile_rows: int) -> int:
        """Shared memory beside the stages: alignment, sums, a finished tile, barriers, and what wgmma reads beyond."""
        turned = self.padded_rows * (tile_rows * 2 + 16)
        return 1024 + self.padded_rows // 2 * 128 * 4 + turned + 512 + (MAX_TILE_ROWS - tile_rows) * BK * 2

    def stage_bytes(self, tile_rows: int) -> int:
        return self.boxes * (tile_rows + self.padded_rows) * BK * 2

    def num_stages(self, tile_rows: int) -> int:
        # An even number: a stage is always for the same warpgroup, which so never waits for one that is two ahead.
        room = SHARED_BYTES - LEFT_BYTES - self.fixed_bytes(tile_rows)
        return min(MAX_STAGES, room // self.stage_bytes(tile_rows) // 2 * 2)

    def shared_bytes(self, tile_rows: int) -> int:
        return self.fixed_bytes(tile_rows) + self.num_stages(tile_rows) * self.stage_bytes(tile_rows)

    def source(self) -> str:
        """The kernel's source with these constants."""
        constants = {
            "BN": self.padded_rows, "CTAS": self.cluster, "BOXES": self.boxes, "RANKS": self.num_ranks,
            "BF16": int(self.dtype == torch.bfloat16), "WGMMA": wgmma(self.padded_rows, self.dtype),
            "LAUNCH": f"{MAX_CTAS + 1}ull", "HALF": f"{HALF_BYTES}ull",
        }  # fmt: skip
        return compiled.defines(constants) + "".join(path.read_text(encoding="utf-8") for path in SOURCES)


@functools.cache
def kernel_of(constants: Constants, device_index: int) -> tuple[object, int]:
    """The kernel, compiled and loaded, and how many of its CTAs run at a time.

    RuntimeError while a graph is captured.
    """
    shared_bytes = SHARED_BYTES - LEFT_BYTES
    kernel = compiled.function(constants.source(), "decode_kernel", shared_bytes, device_index)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = constants.cluster, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = NUM_THREADS, 1, 1
    config.sharedMemBytes = shared_bytes
    return kernel, compiled.checked(driver.cuOccupancyMaxActiveClusters(kernel, config)) * constants.cluster


def fits(num_rows: int, num_columns: int, num_ranks: int) -> bool:
    """Whether the kernel and the inboxes have room for a product of this shape."""
    return 0 < num_rows <= MAX_ROWS and num_columns % 4 == 0 and num_ranks * num_rows * num_columns * 4 <= LINE_BYTES


def readable(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether TMA can read them where they lie."""
    return x.shape[1] > 0 and all(
        tensor.stride(1) == 1 and tensor.stride(0) % MULTIPLE == 0 and tensor.data_ptr() % 16 == 0
        for tensor in (x, weight)
    )


def decode(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, box: Box, *, cluster: int = 2, boxes: int = 2
) -> None:
    """x @ weight.T + bias, (M, N), into the inboxes of all ranks, from where `sum_norm` or `take_sum` takes it.

    x: (M, K), weight: (N, K), bf16 or fp16, `readable` and of a shape that `fits`; bias: (N,), contiguous. cluster,
    boxes: as in `Constants`; by default what was fastest on an H200. Raises ValueError where there is no room for two
    stages of so many boxes.
    """
    key = "decode", x.shape, weight.shape, x.stride(0), weight.stride(0), x.dtype, cluster, boxes
    prepared = box.launches.get(key)
    if prepared is None:
        prepared = box.launches.keep(key, prepare(x, weight, box, cluster, boxes))
    launch, weights, its_box, xs, x_box, bias_place = prepared
    weights.set(weight, *its_box)
    xs.set(x, *x_box)
    bias_place.value = 0 if bias is None else bias.data_ptr()
    launch()


def prepare(x: torch.Tensor, weight: torch.Tensor, box: Box, cluster: int, boxes: int) -> tuple:
    """(the launch; weight's maps and their boxes; x's; where the bias is read). Collective."""
    (num_rows, k), num_columns = x.shape, len(weight)
    rows = padded_rows(num_rows)
    constants = Constants(rows, cluster, boxes, len(box.inboxes), x.dtype)
    kernel, num_ctas = kernel_of(constants, box.device_index)
    box.together(("decode", constants))
    tile_rows = tile_rows_of(num_columns, num_ctas)
    num_tiles, num_steps = -(-num_columns // tile_rows), -(-k // (boxes * BK))
    num_stages = constants.num_stages(tile_rows)
    if num_stages < 2:
        raise ValueError(f"boxes = {boxes}: there is no room for two stages of {num_rows} rows; take fewer")
    sizes = (tile_rows, num_stages, num_tiles, num_steps, num_rows, num_columns)
    bias_place, unset = ctypes.c_uint64(), (ctypes.c_uint64 * 16)()
    launch = Launch(
        int(kernel), min(num_ctas, -(-num_tiles // cluster) * cluster), NUM_THREADS, constants.shared_bytes(tile_rows),
        [unset, unset, (ctypes.c_uint64 * len(box.inboxes))(*box.inboxes), ctypes.c_uint64(box.counter), bias_place,
         *map(ctypes.c_int32, sizes)],
        box.device_index, early=True,
    )  # fmt: skip
    weight_box, x_box = (tile_rows, BK, PROMOTION), (rows, BK, PROMOTION)
    return launch, Maps(launch, 0), weight_box, Maps(launch, 1), x_box, bias_place
