"""Hugging Face transformers' `generate`: as it comes (the published baseline), and with a static cache and
torch.compile."""

import time
from importlib.metadata import version

import torch
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from study.sections.inference.engines.engine import Generation, usable_cores


class FirstToken(StoppingCriteria):
    """Reads the clock when the first token exists, and never stops anything.

    `generate` calls it after each token is chosen, right before it reads back itself whether to stop, which waits for
    the device at every token. So the one synchronisation added here, at the first token only, waits for what is waited
    for anyway and does not lengthen the generation.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.at_s: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs) -> torch.Tensor:
        if self.at_s is None:
            synchronize(self.device)
            self.at_s = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class TransformersEngine:
    """Greedy decoding of exactly the asked number of tokens: no end-of-sequence token is configured, so none ends it.

    `is_compiled`: a static cache, and the decode step under torch.compile. On a GPU in the mode that `generate` chooses
    itself, "reduce-overhead" (CUDA graphs). The prompt's pass is not compiled, in either arm. On a
    GPU every batch size is compiled on its own, as for a service of fixed batch; on a CPU, where that takes most of a
    minute each, torch.compile decides when a size becomes dynamic.
    """

    def __init__(self, path: str, dtype: str, device: str, is_compiled: bool):
        begin = time.perf_counter()
        self.device = torch.device(device)
        self.threads = len(usable_cores())
        torch.set_num_threads(self.threads)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(self.device).eval()
        # Not the checkpoint's own settings: those may sample, and stop early.
        self.model.generation_config = GenerationConfig()
        self.options = {}
        if is_compiled:
            on_gpu = self.device.type == "cuda"
            mode = "reduce-overhead" if on_gpu else "default"
            compile_config = CompileConfig(dynamic=False if on_gpu else None, mode=mode)
            # `generate` compiles on accelerators only, unless it is told so.
            compile_config._compile_all_devices = True
            self.options = {"cache_implementation": "static", "compile_config": compile_config}
        self.version = f"transformers {version('transformers')}"
        synchronize(self.device)
        self.start_s = time.perf_counter() - begin

    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> Generation:
        """`prompts`: [batch][tokens] of one common length, so no padding."""
        synchronize(self.device)
        begin = time.perf_counter()
        input_ids = torch.tensor(prompts, device=self.device)
        first = FirstToken(self.device)
        output = self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            max_new_tokens=num_new_tokens,
            stopping_criteria=StoppingCriteriaList([first]),
            **self.options,
        )
        tokens = output[:, input_ids.shape[1] :].tolist()
        end = time.perf_counter()
        if self.options and not hasattr(self.model, "_compiled_call") and num_new_tokens > 1:
            raise RuntimeError("transformers did not compile the decode step")
        return Generation(tokens, end - begin, first.at_s - begin)

    def close(self) -> None:
        del self.model
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
