"""What a machine does, measured in the first seconds of its first run and kept: from it follow types and sizes."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from study.harness.machine import Machine

PUBLISHED_DTYPE = "bf16"
# Another type replaces the published one where it multiplies so many times as fast: more than one measurement differs
# from the next.
WORTH_ANOTHER_TYPE = 1.15
TIMEOUT_S = 300.0
PROGRAM = "study.harness.measure_rates"


@dataclass(frozen=True)
class Rates:
    """What one rank does while all others do the same.

    flops: floating-point operations a second of a square matmul, by type ("bf16", "fp16", "fp32"). all_reduce_us: time
    of the default all-reduce (NCCL, gloo) by bytes, {} for a single rank. copy_bytes_per_s: of memory, bytes read and
    written counted. start_s: from the start of the ranks' processes until they have joined.
    """

    num_ranks: int
    flops: Mapping[str, float]
    all_reduce_us: Mapping[int, float]
    copy_bytes_per_s: float
    start_s: float

    @property
    def dtype(self) -> str:
        """The type to measure in: the fastest that this machine has, the published one where they are alike."""
        fastest = max(self.flops, key=self.flops.get)
        published = self.flops.get(PUBLISHED_DTYPE, 0.0)
        return fastest if self.flops[fastest] > WORTH_ANOTHER_TYPE * published else PUBLISHED_DTYPE

    def named(self, name: str, names: Mapping[str, str]) -> str:
        """The type that a section calls `name`, by its `names` of our types."""
        return next(ours for ours, theirs in names.items() if theirs == name)

    def matmul_s(self, m: int, n: int, k: int, dtype: str) -> float:
        """Seconds of (m, k) @ (k, n); of a type that was not measured, as of the slowest."""
        return 2.0 * m * n * k / self.flops.get(dtype, min(self.flops.values()))

    def all_reduce_s(self, num_bytes: float) -> float:
        """Seconds of the default all-reduce: that of the next measured size, growing with the bytes beyond."""
        if not self.all_reduce_us:
            return 0.0
        largest = max(self.all_reduce_us)
        us = next((us for size, us in sorted(self.all_reduce_us.items()) if size >= num_bytes), None)
        return 1e-6 * (us if us is not None else self.all_reduce_us[largest] * num_bytes / largest)

    @classmethod
    def from_json(cls, content: Mapping) -> "Rates":
        """What `to_json` gave; JSON has texts for the sizes."""
        return cls(**{**content, "all_reduce_us": {int(size): us for size, us in content["all_reduce_us"].items()}})

    def to_json(self) -> dict:
        return asdict(self)


def measure(machine: Machine, environment: Mapping[str, str], num_ranks: int) -> Rates:
    """The rates of this machine, by a torchrun of PROGRAM. RuntimeError with the end of its output where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "rates.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        supervisor = [sys.executable, "-m", "study.harness.supervise"]
        log = pathlib.Path(folder) / "log"
        with open(log, "wb") as stream:
            process = subprocess.Popen(
                [*supervisor, *torchrun, "-m", PROGRAM, machine.kind, str(output)],
                env={**environment, "MACO_STARTED": repr(time.time())},
                stdin=subprocess.PIPE,  # the supervisor's lifeline
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                stream.write(f"\nstopped after {TIMEOUT_S:.0f} s".encode())
            finally:
                process.stdin.close()
                process.wait()
        if not output.exists():
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise RuntimeError(f"what this machine does could not be measured; {PROGRAM} ended:\n{tail}")
        return Rates.from_json(json.loads(output.read_text(encoding="utf-8")))


def started_at() -> float:
    """When `measure` started the ranks, on `time.time()`."""
    return float(os.environ["MACO_STARTED"])
