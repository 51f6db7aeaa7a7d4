"""Section 0: ceilings of one machine, each alone: matmul rate, memory copy, copies between devices and to the host.

One process sees every device; `maco_lib.timing` times each call alone by the device's clock (a CPU: the host's).
"""

import ctypes
import math
from collections.abc import Callable

import torch

from maco_lib.comm import DTYPES
from maco_lib.stats import median_interval
from maco_lib.timing import Arm, interleave
from study.harness.machine import this_machine
from study.harness.worker import Context, Result, Samples, main
from study.sections.environment.section import MIN_ITERATIONS

# Greatest error allowed in an element of a matmul of standard normal operands, in units of its deviation √k: bf16
# rounds the result to 8 bits, fp16 to 11, of elements up to about 6 deviations; fp32 only accumulates its rounding.
TOLERANCES = {"bf16": 6 * 2**-8, "fp16": 6 * 2**-11, "fp32": 1e-3}
NOT_TIMED = ("time_us", "iterations")


def measure(point: dict, context: Context) -> Result:
    """One point of `study.sections.environment.section`: one row with `value` in `unit` and the time of one call."""
    unit = "TFLOP/s" if point["quantity"] == "matmul" else "GB/s"
    if point["quantity"] == "link_limit":
        limit = this_machine().description["link_limit_gb_per_s"]
        row = {**dict.fromkeys(NOT_TIMED, math.nan), "value": limit, "value_lo": limit, "value_hi": limit}
        return Result([{**row, "timing": "", "unit": unit, "source": "nvml", "correct": True}])
    if point["threads"]:
        torch.set_num_threads(point["threads"])
    reason = unreachable(point)
    if reason:
        return failed(unit, reason)
    device = torch.device(point["device"])
    prepare = prepare_matmul if point["quantity"] == "matmul" else prepare_copy
    call, is_correct, work = prepare(point, device)
    call()
    context.step()
    if not is_correct():
        return failed(unit, f"{point['quantity']} gave a wrong result")
    timing = interleave(
        [Arm("call", call)], group=None, device=device, budget_s=point["budget_s"], min_iterations=MIN_ITERATIONS
    )["call"]
    median, low, high = median_interval(timing.slowest)
    row = {"value": work / median, "value_lo": work / high, "value_hi": work / low, "time_us": median}
    row.update(unit=unit, source="measured", correct=True, iterations=len(timing.slowest), timing=timing.timing)
    return Result([row], [Samples("time_us", timing.values)])


def failed(unit: str, error: str) -> Result:
    """The row of a quantity that has no value, and why."""
    empty = dict.fromkeys(("value", "value_lo", "value_hi", *NOT_TIMED), math.nan)
    return Result([{**empty, "timing": "", "unit": unit, "source": "measured", "correct": False, "error": error}])


def unreachable(point: dict) -> str:
    """Why the two devices of a peer copy cannot reach each other; "" where they can, or where there is one device."""
    if not point["peer"]:
        return ""
    first, second = torch.device(point["device"]), torch.device(point["peer"])
    if torch.cuda.can_device_access_peer(first, second) and torch.cuda.can_device_access_peer(second, first):
        return ""
    return f"{first} and {second} cannot access each other's memory (no P2P)"


def prepare_matmul(point: dict, device: torch.device) -> tuple[Callable[[], None], Callable[[], bool], float]:
    """The call to time, its check against float64 on some rows, its work in 1e6 operations (work/µs is TFLOP/s)."""
    m, n, k = point["m"], point["n"], point["k"]
    a_mk = torch.randn(m, k, device=device).to(DTYPES[point["dtype"]])
    b_kn = torch.randn(k, n, device=device).to(DTYPES[point["dtype"]])
    out_mn = torch.empty(m, n, device=device, dtype=a_mk.dtype)

    def is_correct() -> bool:
        rows = torch.arange(0, m, max(1, m // 8), device=device)
        worst = (out_mn[rows].double() - a_mk[rows].double() @ b_kn.double()).abs().max().item()
        return worst <= TOLERANCES[point["dtype"]] * math.sqrt(k)

    return lambda: torch.mm(a_mk, b_kn, out=out_mn), is_correct, 2.0 * m * n * k / 1e6


def prepare_copy(point: dict, device: torch.device) -> tuple[Callable[[], None], Callable[[], bool], float]:
    """The copy to time, its check, and its work in 1e3 bytes (so work/µs is GB/s).

    Within one memory the bytes read and the bytes written count, between two the bytes that cross.
    """
    num_bytes, quantity = point["bytes"], point["quantity"]
    source_device, target_device = {
        "memory_copy": (device, device),
        "host_to_device": ("cpu", device),
        "device_to_host": (device, "cpu"),
        "peer_write": (device, point["peer"]),
        "peer_read": (point["peer"], device),
    }[quantity]
    source = torch.randn(num_bytes // 4, device=device).to(source_device)
    target = torch.empty(num_bytes // 4, device=target_device)
    if quantity in ("host_to_device", "device_to_host"):
        source, target = (tensor.pin_memory() if tensor.device.type == "cpu" else tensor for tensor in (source, target))

    def is_correct() -> bool:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return torch.equal(source.to(target.device), target)

    if quantity in ("peer_write", "peer_read"):
        # Copies both ways, so that torch grants each device access to the other's memory.
        target.copy_(source)
        source.copy_(target)
        for ordinal in (source.device, target.device):
            torch.cuda.synchronize(ordinal)
        target.zero_()
        torch.cuda.synchronize(target.device)
        call = peer_copy(source, target, device)
    else:

        def call() -> None:
            if quantity == "memory_copy":  # by a kernel: a graph's copy node may run on a slower copy engine
                torch.mul(source, 1.0, out=target)
            else:
                target.copy_(source, non_blocking=True)

    work = num_bytes / 1e3 * (2 if quantity == "memory_copy" else 1)
    return call, is_correct, work


def peer_copy(source: torch.Tensor, target: torch.Tensor, device: torch.device) -> Callable[[], None]:
    """A copy on `device`'s stream, whoever owns the source: `Tensor.copy_` runs on the source's, so it only writes."""
    driver = ctypes.CDLL("libcuda.so.1")
    copy = driver.cuMemcpyAsync
    copy.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    num_bytes = source.numel() * source.element_size()

    def call() -> None:
        stream = torch.cuda.current_stream(device).cuda_stream
        status = copy(target.data_ptr(), source.data_ptr(), num_bytes, stream)
        if status != 0:
            raise RuntimeError(f"cuMemcpyAsync from {source.device} to {target.device} failed with CUresult {status}")

    return call


if __name__ == "__main__":
    main(measure)
