"""What every engine is: prompts of token ids in, new tokens and two times out."""

import os
import pathlib
from dataclasses import dataclass
from typing import Protocol

from study.harness.machine import num_cores


@dataclass(frozen=True)
class Generation:
    """What one call gave: `tokens[request][i]`, the new tokens only; seconds of the whole call (E2E); seconds from its
    start until the last request's first token was there (TTFT: for batch 1 the usual one)."""

    tokens: list[list[int]]
    e2e_s: float
    ttft_s: float


class Engine(Protocol):
    """A loaded model. `start_s`: seconds from nothing to ready, compilation at start included. `threads`: CPU threads
    that compute. `version`: of the library."""

    start_s: float
    threads: int
    version: str

    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> Generation: ...

    def close(self) -> None: ...


def usable_cores() -> list[int]:
    """The first logical CPU of every physical core this process may run on, as many as it has time for: all arms
    compute on these."""
    cores: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = pathlib.Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(siblings.read_text(encoding="utf-8") if siblings.exists() else str(cpu), cpu)
    return list(cores.values())[: num_cores()]
