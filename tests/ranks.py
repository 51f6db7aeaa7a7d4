"""Start N gloo ranks for a test, with a time limit, and leave none behind."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]

PROGRAM = """
import atexit, datetime, importlib, os, sys

def leave():  # as experiments/worker.py does, and for its reason
    if is_done and backend != "nccl":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

is_done = False
atexit.register(leave)  # the first one, so that it runs last
import torch, torch.distributed as dist
torch.set_num_threads(1)
module, function, backend = sys.argv[1:4]
rank = int(os.environ["LOCAL_RANK"])
if backend == "nccl":
    torch.cuda.set_device(rank)
device = torch.device("cuda", rank) if backend == "nccl" else None
dist.init_process_group(backend or None, timeout=datetime.timedelta(seconds=30), device_id=device)
try:
    getattr(importlib.import_module(module), function)(dist.get_rank(), dist.get_world_size())
finally:
    dist.destroy_process_group()
is_done = True
"""


def run_ranks(function, num_ranks: int = 2, backend: str = "gloo", timeout_s: float = 90.0) -> str:
    """Run `function(rank, num_ranks)`, at the top level of a test module, on every rank; returns what they printed.

    backend: of the default group; "": none is named to torch.

    Raises AssertionError with the ranks' output when one fails or they take longer than `timeout_s`; the ranks and
    everything that they started are gone when this returns.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        program = pathlib.Path(folder, "ranks_main.py")
        program.write_text(PROGRAM)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        command += [str(program), function.__module__.rpartition(".")[2], function.__name__, backend]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun passes it on to its ranks, which have sessions of their own
            try:
                output, _ = process.communicate(timeout=40)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
            raise AssertionError(f"{function.__name__} took over {timeout_s} s:\n{output}") from None
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    assert process.returncode == 0, f"{function.__name__} failed on {num_ranks} ranks:\n{output}"
    return output
