"""Have cuBLAS leave SMs to a collective.

Its kernels on Hopper GPUs give every CTA its tiles in advance, one CTA to an SM. One that finds its SM taken comes
late, and the matmul with it (table `sm_sharing`); one that knows how many SMs there are spreads its tiles over those.
"""

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import torch


@functools.cache
def library() -> ctypes.CDLL:
    """The cuBLAS that torch has loaded; OSError where it has none, as on other makers' GPUs, or by another name."""
    torch.cuda.current_blas_handle()  # loads it
    return ctypes.CDLL(f"libcublas.so.{(torch.version.cuda or 'none').split('.')[0]}")


def unavailable(num_sms: int, device: torch.device) -> str:
    """Why matmuls cannot be told to leave so many SMs of this GPU, or ""."""
    try:
        library().cublasSetSmCountTarget  # noqa: B018
    except (OSError, AttributeError) as error:
        return f"only a cuBLAS that has cublasSetSmCountTarget leaves SMs: {error}"
    total = torch.cuda.get_device_properties(device).multi_processor_count
    return "" if 0 <= num_sms < total else f"{device} has {total} SMs, of which some are to be left to the computation"


def target(handle: ctypes.c_void_p) -> int:
    """How many SMs the cuBLAS handle's matmuls are for; 0: all. RuntimeError with cuBLAS's status."""
    num_sms = ctypes.c_int()
    if status := library().cublasGetSmCountTarget(handle, ctypes.byref(num_sms)):
        raise RuntimeError(f"cublasGetSmCountTarget failed with status {status}")
    return num_sms.value


def set_target(handle: ctypes.c_void_p, num_sms: int) -> None:
    """Have the cuBLAS handle's matmuls be for `num_sms`; 0: all. RuntimeError with cuBLAS's status."""
    if status := library().cublasSetSmCountTarget(handle, ctypes.c_int(num_sms)):
        raise RuntimeError(f"cublasSetSmCountTarget({num_sms}) failed with status {status}")


@contextlib.contextmanager
def leaving(num_sms: int, device: torch.device) -> Iterator[None]:
    """Matmuls that this thread issues within leave `num_sms` SMs of `device` alone; on other devices nothing changes.

    Those by cuBLAS: not other libraries', nor cuBLASLt's (as with a bias), for which torch has a setting of its own.
    Afterwards they are for as many SMs as before; within another `leaving`, the inner number holds.
    Raises ValueError on a number that the GPU does not have to leave.
    """
    with torch.cuda.device(device):
        total = torch.cuda.get_device_properties(device).multi_processor_count
        if not 0 <= num_sms < total:
            raise ValueError(f"num_sms = {num_sms} to be left of the {total} of {device}")
        handle = ctypes.c_void_p(torch.cuda.current_blas_handle())  # this thread's for this GPU
        before = target(handle)
        set_target(handle, total - num_sms)
        try:
            yield
        finally:
            set_target(handle, before)
