"""vLLM's offline engine, as it comes and with `enforce_eager` (no torch.compile, no CUDA graphs)."""

import atexit
import os
import time
from collections.abc import Callable

from study.sections.inference.engines.engine import Generation, usable_cores

# What torchrun tells its ranks would make vLLM's own processes join the wrong group.
TORCHRUN_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # FlashInfer's sampler needs FlashInfer, which vLLM would otherwise expect on Hopper.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # This process has threads and may hold a CUDA context: neither survives a fork.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
CPU_KV_CACHE_GIB = 2
# The context is limited to what is asked, in these steps: on a CPU the cache for Qwen3's full context would not fit.
CONTEXT_STEP = 256


class VllmEngine:
    """Greedy decoding of exactly the asked number of tokens (`ignore_eos`), from the same token ids as the other arms.

    Prefix caching is off: the repetitions ask the same prompts again, and would skip their prefill. Everything else is
    vLLM's default, its own process for the engine included; except that on a CPU it computes on the cores that every
    arm computes on, where its default leaves one of them to its scheduler.
    """

    def __init__(
        self, path: str, dtype: str, device: str, max_tokens: int, enforce_eager: bool, on_step: Callable[[], object]
    ):
        prepare_environment(device)
        begin = time.perf_counter()
        import vllm

        on_step()
        self.sampling = vllm.SamplingParams
        self.version = f"vllm {vllm.__version__}"
        self.threads = len(usable_cores())
        self.llm = vllm.LLM(
            model=path,
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=-(-max_tokens // CONTEXT_STEP) * CONTEXT_STEP,
            enforce_eager=enforce_eager,
            enable_prefix_caching=False,
            disable_log_stats=False,
            generation_config="vllm",
            seed=0,
        )
        self.start_s = time.perf_counter() - begin
        # Before multiprocessing's own exit handler, which would wait for the engine's processes.
        atexit.register(self.close)

    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> Generation:
        """`prompts`: [batch][tokens]. TTFT from the engine's own record of each request: arrival and first token."""
        options = self.sampling(temperature=0.0, max_tokens=num_new_tokens, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        # The engine stamps a request's arrival with time.time(), so that is the clock of the TTFT.
        begin_wall, begin = time.time(), time.perf_counter()
        outputs = self.llm.generate(requests, options, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        end = time.perf_counter()
        first = max(output.metrics.arrival_time + output.metrics.first_token_latency for output in outputs)
        return Generation(tokens, end - begin, first - begin_wall)

    def close(self) -> None:
        """End the engine's processes and wait for them."""
        atexit.unregister(self.close)
        self.llm.llm_engine.engine_core.shutdown()


def prepare_environment(device: str) -> None:
    """Set what vLLM needs to know and remove what torchrun left, for this process and the children it starts."""
    for name in [*TORCHRUN_VARIABLES, *(name for name in os.environ if name.startswith("TORCHELASTIC_"))]:
        os.environ.pop(name, None)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if device == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CPU_KV_CACHE_GIB))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, usable_cores())))
        # A number of threads given by the launcher would contradict that binding.
        os.environ.pop("OMP_NUM_THREADS", None)
