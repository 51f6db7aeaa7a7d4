"""Start N ranks for a test, with a time limit, and leave none behind."""

import atexit
import contextlib
import datetime
import multiprocessing
import os
import pathlib
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Ranks are forked from a process that has imported what takes seconds and computed nothing, so that each is as good as
# new; CUDA does not survive a fork, so ranks with GPUs start from nothing.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["pytest", "hypothesis", "torch.distributed", "torch._dynamo", "maco_lib.overlap", "study.report.figures"]
)


def rank_main(function, rank: int, num_ranks: int, backend: str, folder: str, environment: dict[str, str]) -> None:
    os.setsid()
    output = os.open(f"{folder}/output-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1), os.dup2(output, 2)
    os.environ.clear()
    os.environ |= environment | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    try:
        with_group(function, rank, num_ranks, backend, f"file://{folder}/store")
        atexit._run_exitfuncs()  # which multiprocessing leaves out
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def with_group(function, rank: int, num_ranks: int, backend: str, store: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend or None,
        init_method=store,
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=30),
        device_id=torch.device("cuda", rank) if backend == "nccl" else None,
    )
    if backend == "gloo":
        dist.barrier()  # a rank that has done its part before the others have connected leaves them with an error
    try:
        function(rank, num_ranks)
    finally:
        dist.destroy_process_group()


def run_ranks(function, num_ranks: int = 2, backend: str = "gloo", timeout_s: float = 240.0) -> str:
    """Run `function(rank, num_ranks)`, at the top level of a test module, on every rank; returns what they printed.

    backend: of the default group; "": none is named to torch.

    Raises AssertionError with the ranks' output when one fails or they take longer than `timeout_s`; the ranks and
    everything that they started are gone when this returns.
    """
    context = multiprocessing.get_context("spawn") if backend == "nccl" else FORKED
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as folder:
        fixed = (num_ranks, backend, folder, dict(os.environ))
        ranks = [context.Process(target=rank_main, args=(function, rank, *fixed)) for rank in range(num_ranks)]
        for rank in ranks:
            rank.start()
        try:
            while (running := [rank for rank in ranks if rank.is_alive()]) and time.monotonic() < deadline:
                wait([rank.sentinel for rank in running], timeout=deadline - time.monotonic())
                if any(rank.exitcode for rank in ranks):
                    deadline = min(deadline, time.monotonic() + 2)  # the others end by themselves, or wait for it
        finally:
            codes = [rank.exitcode for rank in ranks]
            for rank in ranks:
                rank.kill()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.pid, signal.SIGKILL)  # what it has started
        for rank in ranks:
            rank.join()
        output = "\n".join(path.read_text() for path in sorted(pathlib.Path(folder).glob("output-*")))
    failed = "failed" if any(codes) else f"took over {timeout_s} s"
    assert codes == [0] * num_ranks, f"{function.__name__} {failed} on {num_ranks} ranks, exit codes {codes}:\n{output}"
    return output
