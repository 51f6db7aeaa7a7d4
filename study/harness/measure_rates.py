"""What this machine does, in seconds: matmuls by type, the default all-reduce, memory; every rank at the same time.

    torchrun --nproc-per-node N -m study.harness.measure_rates KIND OUTPUT

The sizes grow until a run is long enough to be timed, so that a slow type costs no more than a fast one.
"""

import functools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from maco_lib.comm import DTYPES
from maco_lib.timing import decided, gather, synchronize
from study.harness.rates import TIMEOUT_S, Rates, started_at
from study.harness.supervise import die_with_parent
from study.harness.worker import joined

ENOUGH_S = {"cpu": 0.03, "cuda": 0.0005}
MATMUL_N = {"cpu": (128, 256, 512, 1024), "cuda": (1024, 2048, 4096, 8192)}
NAMES = {"cpu": ("bf16", "fp32"), "cuda": ("bf16", "fp16", "fp32")}
ALL_REDUCE_BYTES = (2**16, 2**20, 2**23)
COPY_BYTES = 2**26
NUM_RUNS = 3


def seconds(run: Callable[[], object], group: dist.ProcessGroup | None, device: torch.device) -> float:
    """Of one run on the slowest rank: the median of a few after a warm-up, which all ranks begin together."""
    times = []
    for _ in range(NUM_RUNS + 1):
        gather(None, group)
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        times.append(max(gather(time.perf_counter() - begin, group)))
    return statistics.median(times[1:])


def matmul_flops(name: str, group: dist.ProcessGroup | None, device: torch.device) -> float:
    """FLOP/s of the first square matmul that takes long enough, or of the largest."""
    for n in MATMUL_N[device.type]:
        a, b = (torch.randn(n, n, device=device).to(DTYPES[name]) for _ in range(2))
        taken = seconds(functools.partial(torch.mm, a, b), group, device)
        if taken >= ENOUGH_S[device.type]:
            break
    return 2.0 * n**3 / taken


def main(kind: str, output: str) -> None:
    die_with_parent()
    num_ranks = int(os.environ["WORLD_SIZE"])
    with joined(num_ranks, kind, TIMEOUT_S) as (device, group):
        start_s = max(gather(time.time() - started_at(), group))
        names = [name for name in NAMES[kind] if kind == "cpu" or name != "bf16" or is_native(device)]
        flops = {name: matmul_flops(decided(name, group), group, device) for name in names}
        source = torch.randn(COPY_BYTES // 4, device=device)
        copy = seconds(functools.partial(torch.empty_like(source).copy_, source), group, device)
        all_reduce_us = {}
        for num_bytes in ALL_REDUCE_BYTES if group else ():
            tensor = torch.randn(num_bytes // 4, device=device)
            all_reduce_us[num_bytes] = 1e6 * seconds(functools.partial(dist.all_reduce, tensor), group, device)
        rates = Rates(num_ranks, flops, all_reduce_us, 2 * COPY_BYTES / copy, start_s)
        if group is None or group.rank() == 0:
            pathlib.Path(output).write_text(json.dumps(rates.to_json()), encoding="utf-8")


def is_native(device: torch.device) -> bool:
    """Whether the GPU multiplies bf16 itself."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
