"""Start the engine of an arm.

Its `generate(prompts, num_new_tokens)` takes token ids in host lists and returns token ids in host lists with its two
times, so every arm is timed between the same two points: the whole call on the host's clock.
"""

from collections.abc import Callable

from study.sections.inference.engines.engine import Engine

ARMS = ("transformers_eager", "transformers_compiled", "vllm_eager", "vllm")
BASELINE = "transformers_eager"


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
        from study.sections.inference.engines.transformers_engine import TransformersEngine

        on_step()
        return TransformersEngine(path, dtype, device, is_compiled=arm == "transformers_compiled")
    from study.sections.inference.engines.vllm_engine import VllmEngine

    return VllmEngine(path, dtype, device, max_tokens, enforce_eager=arm == "vllm_eager", on_step=on_step)
