"""The toy's program, which every rank runs; apart from its section, which ranks need not import."""

import os
import pathlib
import time

import torch
import torch.distributed as dist

from study.harness import worker

STEP_S = worker.HEARTBEAT_S = 0.2


def measure(point, context):
    with pathlib.Path(os.environ["TOY_LOG"]).open("a") as log:
        log.write(f"{point['size']}\n")
    for _ in range(round(point["seconds"] / STEP_S)):
        time.sleep(STEP_S)
        context.step()
    while point["hangs"]:
        time.sleep(STEP_S)
    if point["fails"]:
        raise RuntimeError(f"the toy breaks at size {point['size']}")
    total = torch.tensor([float(context.rank + 1)])
    dist.all_reduce(total)
    time_us = point["size"] * total.item()
    row = {"time_us": time_us, "time_lo_us": time_us - 1, "time_hi_us": time_us + 1, "correct": True}
    return worker.Result([row], [worker.Samples("time_us", [[time_us] * 4] * context.num_ranks)])


if __name__ == "__main__":
    worker.main(measure)
