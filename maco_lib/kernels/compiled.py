"""CUDA kernels of our own: compiled by NVRTC, which torch brings along."""

import functools

import torch
from cuda.bindings import driver, nvrtc

from maco_lib.kernels.launch import Launch

SHARED_BYTES = 227 * 1024
DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
ELEMENTS = {
    torch.bfloat16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    torch.float16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
}
# Columns of a box that is swizzled by 128 bytes, as wgmma reads it; narrower ones are by 64.
WIDE_BOX = 64


def checked(answer: tuple) -> object:
    """What a call of the driver or NVRTC returned; RuntimeError with its error code."""
    error, *values = answer
    if int(error) != 0:
        raise RuntimeError(f"{type(error).__name__} {error.name}")
    return values[0] if len(values) == 1 else values


def defines(constants: dict[str, object]) -> str:
    """The constants as the first lines of a source."""
    return "".join(f"#define {name} {value}\n" for name, value in constants.items())


def wgmma(columns: int, dtype: torch.dtype) -> str:
    """A warpgroup's instruction: sum[columns / 2] += 64 rows by `columns`, 16 deep, of the matrices a and b."""
    registers, kind = columns // 2, DTYPES[dtype]
    outputs = ", ".join(f"%{index}" for index in range(registers))
    operands = ", ".join(f'"+f"(sum[{index}])' for index in range(registers))
    return (
        f'asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{registers + 2}, 0; '
        f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} "
        f'{{{outputs}}}, %{registers}, %{registers + 1}, p, 1, 1, 0, 0; }}" '
        f': {operands} : "l"(a), "l"(b), "r"(add))'
    )


def cubin(source: str, name: str) -> bytes:
    """The source compiled for Hopper; RuntimeError with the compiler's log."""
    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, None, None))
    options = [b"--gpu-architecture=sm_90a", b"-std=c++17"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(error) != 0:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{name}: {log.decode()}")
    binary = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, binary))
    return binary


@functools.cache
def function(source: str, name: str, shared_bytes: int, device_index: int) -> object:
    """The kernel `name` of the source, compiled and loaded once; RuntimeError while a graph is captured."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{name} cannot be compiled while a graph is captured: call before")
    with torch.cuda.device(device_index):
        torch.cuda.current_stream().synchronize()  # makes the context
        module = checked(driver.cuModuleLoadData(cubin(source, name)))
        loaded = checked(driver.cuModuleGetFunction(module, name.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(loaded, attribute, shared_bytes))
    return loaded


L2_256B = driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B


def tensor_map(
    address: int, num_rows: int, num_columns: int, pitch: int, box_rows: int, box_columns: int, dtype,
    promotion=L2_256B,
):  # fmt: skip
    """How TMA reads or writes boxes of a row-major matrix; pitch: elements from row to row; promotion: what the L2
    cache reads at a time."""
    swizzle = driver.CUtensorMapSwizzle
    return checked(
        driver.cuTensorMapEncodeTiled(
            ELEMENTS[dtype], 2, address,
            [driver.cuuint64_t(num_columns), driver.cuuint64_t(num_rows)], [driver.cuuint64_t(pitch * 2)],
            [driver.cuuint32_t(box_columns), driver.cuuint32_t(box_rows)], [driver.cuuint32_t(1)] * 2,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle.CU_TENSOR_MAP_SWIZZLE_128B if box_columns == WIDE_BOX else swizzle.CU_TENSOR_MAP_SWIZZLE_64B,
            promotion,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )  # fmt: skip


class Maps:
    """The tensor maps of one operand, by where it begins: made once for each place."""

    MOST = 1024

    def __init__(self, launch: Launch, index: int):
        self.launch, self.index, self.made = launch, index, {}

    def set(self, tensor: torch.Tensor, box_rows: int, box_columns: int, promotion=L2_256B) -> None:
        """Have the launch read or write `tensor`, always of one shape, pitch and type, as its argument `index`."""
        made = self.made.get(tensor.data_ptr())
        if made is None:
            if len(self.made) >= self.MOST:
                self.made.clear()
            shape = (*tensor.shape, tensor.stride(0))
            it = tensor_map(tensor.data_ptr(), *shape, box_rows, box_columns, tensor.dtype, promotion)
            made = self.made[tensor.data_ptr()] = int(it.getPtr()), it
        self.launch.places[self.index] = made[0]
