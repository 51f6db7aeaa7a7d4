"""What the NVIDIA driver says of the GPUs this process may use, through NVML; no CUDA context is made."""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pynvml


def ask(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)`, or None where this driver, GPU or container does not answer that question."""
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None


@contextlib.contextmanager
def session() -> Iterator[bool]:
    """NVML for the duration of the block; yields whether a driver answers."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, or no GPU it can reach
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()


def select(uuids: list[str], visible: str | None) -> list[int]:
    """Indices of the GPUs in CUDA_VISIBLE_DEVICES = `visible` (None: all), by CUDA's rules.

    Entries are indices or beginnings of UUIDs; the first one that names no GPU, or one already named, ends the list.
    Indices mean the driver's PCI order here, as with CUDA_DEVICE_ORDER=PCI_BUS_ID; equal GPUs have that order anyway.
    """
    if visible is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for entry in (text.strip() for text in visible.split(",")):
        if entry.isdecimal():
            matches = [int(entry)] if int(entry) < len(uuids) else []
        else:
            matches = [index for index, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
        if len(matches) != 1 or matches[0] in chosen:
            break
        chosen += matches
    return chosen


def handles() -> list:
    """NVML handles of the GPUs that CUDA_VISIBLE_DEVICES leaves visible, in CUDA's order. Needs an open `session()`."""
    every = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    uuids = [pynvml.nvmlDeviceGetUUID(handle) for handle in every]
    return [every[index] for index in select(uuids, os.environ.get("CUDA_VISIBLE_DEVICES"))]


def nvlink_status(first, second) -> int | None:
    """NVML's status of NVLink between two GPUs, NVML_P2P_STATUS_OK where they have it; None: no answer."""
    return ask(pynvml.nvmlDeviceGetP2PStatus, first, second, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)


@functools.cache
def without_nvlink() -> str:
    """Which two of the visible GPUs the driver does not say to be joined by NVLink ("0 and 1"); "" where none."""
    with session() as answers:
        gpus = list(enumerate(handles())) if answers else []
        for (i, first), (j, second) in itertools.combinations(gpus, 2):
            if nvlink_status(first, second) != pynvml.NVML_P2P_STATUS_OK:
                return f"{i} and {j}"
    return "" if len(gpus) > 1 else "0 and 1"
