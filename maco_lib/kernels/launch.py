"""A kernel ready to be launched: function, grid and arguments laid out once, so that a call hands the driver addresses.

Triton's launcher and the driver's Python binding look at every argument anew: 15 to 50 µs a launch. What differs from
call to call is an argument that the caller keeps and sets, a ctypes scalar or a tensor map.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch

CTYPES = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32, "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64, "fp32": ctypes.c_float,
}  # fmt: skip
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # of CUlaunchAttributeID
raw_stream = torch._C._cuda_getCurrentRawStream if hasattr(torch._C, "_cuda_getCurrentRawStream") else None


class Attribute(ctypes.Structure):
    """The driver's CUlaunchAttribute with the first words of its value."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint32 * 16))


class Config(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)), ("num_attributes", ctypes.c_uint),
    )  # fmt: skip


@functools.cache
def driver() -> ctypes.CDLL:
    """The CUDA driver's library."""
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = (ctypes.c_void_p,) * 4
    return library


class Launches(dict):
    """Launches by what they are for; beyond so many the oldest go, so that changing shapes take no more memory."""

    MOST = 4096

    def keep(self, key, launch):
        """The launch, kept."""
        self[key] = launch
        if len(self) > self.MOST:
            del self[next(iter(self))]
        return launch


class Launch:
    """`launch()` runs the kernel on the current stream of the device.

    function: the driver's handle. arguments: ctypes objects, and objects with a `getPtr()`, in the order of the
    kernel's parameters; they are read at every call. early: before the kernel in front has ended, for which this one
    waits itself (programmatic dependent launch).
    """

    __slots__ = ("function", "arguments", "places", "config", "attribute", "device_index", "address", "run")

    def __init__(
        self, function: int, num_ctas: int, num_threads: int, shared_bytes: int, arguments: Sequence,
        device_index: int, early: bool = False,
    ):  # fmt: skip
        self.function, self.device_index, self.arguments = function, device_index, list(arguments)
        addresses = [int(each.getPtr()) if hasattr(each, "getPtr") else ctypes.addressof(each) for each in arguments]
        self.places = (ctypes.c_void_p * max(1, len(addresses)))(*addresses)
        self.attribute = Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, b"", (1,))
        self.config = Config((num_ctas, 1, 1), (num_threads, 1, 1), shared_bytes, None)
        if early:
            self.config.attributes, self.config.num_attributes = ctypes.pointer(self.attribute), 1
        self.address, self.run = ctypes.addressof(self.config), driver().cuLaunchKernelEx

    def __call__(self) -> None:
        self.config.stream = raw_stream(self.device_index)
        if error := self.run(self.address, self.function, self.places, None):
            name = ctypes.c_char_p()
            driver().cuGetErrorName(error, ctypes.byref(name))
            raise RuntimeError(f"launching a kernel: {(name.value or b'error').decode()} ({error})")


def of_triton(kernel, num_ctas: int, arguments: Sequence, device_index: int, **options) -> tuple[Launch, list]:
    """(launch, its arguments by the kernel's parameters) of a Triton kernel, compiled and loaded now.

    arguments: in the order of the parameters, without the constants, which are among the `options`: ints, floats,
    and tuples of ints; an address, a multiple of 16, may be set to another one later. An argument that Triton has
    made a constant is None.
    """
    with torch.cuda.device(device_index):
        compiled = kernel.warmup(*arguments, grid=(num_ctas,), **options)
        compiled._init_handles()
    metadata = compiled.metadata
    if metadata.num_ctas != 1 or metadata.global_scratch_size or metadata.profile_scratch_size:
        raise RuntimeError(f"{compiled.name} needs a cluster or memory beside its arguments, which nothing here gives")
    values, passed = laid_out(list(compiled.src.signature.values()), arguments)
    scratch = [ctypes.c_uint64(), ctypes.c_uint64()]  # addresses that only some kernels use: parameters all the same
    launch = Launch(
        compiled.function, num_ctas, 32 * metadata.num_warps, metadata.shared, [*passed, *scratch], device_index,
        early=bool(metadata.launch_pdl),
    )  # fmt: skip
    require_parameters(compiled.function, compiled.name, launch.arguments)
    return launch, values


def laid_out(types: Sequence, arguments: Sequence) -> tuple[list, list]:
    """(ctypes scalars by argument, tuples as lists; all that are passed), by the types of Triton's signature."""
    by_argument, passed = [], []
    for kind, value in zip(types, arguments, strict=False):  # the constants come last
        if isinstance(kind, tuple):
            inner, of_tuple = laid_out(kind, value)
            by_argument.append(inner)
            passed += of_tuple
        elif kind == "constexpr":
            by_argument.append(None)
        else:
            by_argument.append((ctypes.c_uint64 if kind.startswith("*") else CTYPES[kind])(value))
            passed.append(by_argument[-1])
    return by_argument, passed


def require_parameters(function: int, name: str, arguments: Sequence) -> None:
    """Raise RuntimeError unless the compiled kernel takes parameters of exactly these sizes."""
    library, sizes = driver(), []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    while not library.cuFuncGetParamInfo(
        ctypes.c_void_p(function), ctypes.c_size_t(len(sizes)), ctypes.byref(offset), ctypes.byref(size)
    ):
        sizes.append(size.value)
    given = [ctypes.sizeof(each) for each in arguments]
    if sizes != given:
        raise RuntimeError(f"{name} was compiled for parameters of {sizes} bytes, not {given}: another Triton's kernel")
