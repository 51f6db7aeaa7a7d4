"""The inference engines under test: one file each, one surface for all.

`start(arm, ...)` returns an engine whose `generate(prompts, num_new_tokens)` takes token ids in host lists and returns
token ids in host lists with its two times, so every arm is timed between the same two points: the whole call on the
host's clock.
"""

import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from maco_lib.machine import num_cores

ARMS = ("transformers_eager", "transformers_compiled", "vllm_eager", "vllm")
BASELINE = "transformers_eager"


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


def start(
    arm: str, path: str, dtype: str, device: str, max_tokens: int, on_step: Callable[[], object] = lambda: None
) -> Engine:
    """Load the checkpoint in the folder `path` for one arm. `max_tokens`: the longest prompt and its new tokens
    together. `on_step` is called as far as the start has got on: the library is imported, the model loaded.

    Raises ModuleNotFoundError where the arm's library is not installed, ValueError for an unknown arm.
    """
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}; the arms are {', '.join(ARMS)}")
    if arm.startswith("transformers"):
        from maco_lib.experiments.engines.transformers_engine import TransformersEngine

        on_step()
        return TransformersEngine(path, dtype, device, is_compiled=arm == "transformers_compiled")
    from maco_lib.experiments.engines.vllm_engine import VllmEngine

    return VllmEngine(path, dtype, device, max_tokens, enforce_eager=arm == "vllm_eager", on_step=on_step)


def usable_cores() -> list[int]:
    """The first logical CPU of every physical core this process may run on, as many as it has time for: all arms
    compute on these."""
    cores: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = pathlib.Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(siblings.read_text(encoding="utf-8") if siblings.exists() else str(cpu), cpu)
    return list(cores.values())[: num_cores()]
