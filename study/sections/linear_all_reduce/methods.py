"""What section 5 compares, without torch: the layers, the two operations, and the methods of each."""

from dataclasses import dataclass, field
from typing import Any

from maco_lib.kernels.decode_tiles import MAX_ROWS
from study.models import MODELS

# The two operations. The second goes on as a decoder layer does: residual added, RMSNorm, both results wanted.
MATMUL, CHAIN = "matmul_all_reduce", "matmul_all_reduce_norm"
# Beside them in the table of what calls cost the host.
OVERLAP = "overlap_auto"
# Up to so many rows (decoding) it is the chain that counts, and other methods are compared than above.
FEW_ROWS = 256

# (N, K) of the row-parallel layers, K of all ranks: o_proj and down_proj of two published models and one like Llama's.
WIDTHS = {
    **{name.removesuffix("-Base"): (MODELS[name].hidden, MODELS[name].heads * MODELS[name].head_dim,
                                    MODELS[name].intermediate) for name in ("Qwen3-8B", "Qwen3-32B")},
    "Llama-70B-like": (8192, 8192, 28672),
}  # fmt: skip
LAYERS: dict[str, tuple[int, int]] = {}
for _model, (_hidden, _attention, _intermediate) in WIDTHS.items():
    LAYERS[f"{_model} o_proj"] = (_hidden, _attention)
    LAYERS[f"{_model} down_proj"] = (_hidden, _intermediate)


@dataclass(frozen=True)
class Method:
    """One way to run an operation. `is_peer`: not of this library's making.

    how, a function of `linear_all_reduce_arms`:
        in_place     a matmul into the memory that `backend` sums, then that all-reduce, as anyone would write it
        plan         `linear_all_reduce` with LinearPlan(**plan)
        untuned      `linear_all_reduce` with the plan that its planner looks up
        auto         `linear_all_reduce` with plan="auto", tuned for the shape
        retired      nothing: a name that stored tables and their parameters hold, without code
        async_tp     torch's fused_matmul_reduce_scatter, then an all-gather
        norm         `linear_all_reduce_norm`, this library's chain, with the plan `norm`
    norm: for "norm" its plan; for another chain: "one_kernel" of residual and RMSNorm after the sum, or "two_kernels".
    min_rows, max_rows: up to FEW_ROWS rows it is compared from and up to so many; max_rows = 0: up to all of them.
    """

    how: str
    backend: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    norm: str = ""
    is_peer: bool = False
    min_rows: int = 1
    max_rows: int = 0

    def is_for(self, rows: int) -> bool:
        """Whether it is compared at so few rows."""
        return self.min_rows <= rows <= (self.max_rows or rows)

    @property
    def num_chunks(self) -> int:
        """Pieces that the matmul is cut in."""
        return self.plan["num_chunks"] if self.plan.get("technique") == "chunked" else 1


def _sequential(backend: str) -> Method:
    return Method("plan", backend, {"technique": "sequential", "backend": backend})


def _chunked(backend: str, num_chunks: int, is_peer: bool = False) -> Method:
    plan = {"technique": "chunked", "backend": backend, "num_chunks": num_chunks}
    return Method("plan", backend, plan, is_peer=is_peer)


_PEER_BACKENDS = {
    "sequential_gloo": "gloo",
    "sequential_nccl": "nccl",
    "sequential_nccl_symmetric": "nccl_symmetric",
    "sequential_one_shot": "symm_mem_one_shot",
    "sequential_two_shot": "symm_mem_two_shot",
    "sequential_vllm_custom": "vllm_custom",
}
OUR_BACKENDS = ("maco_ll", "maco_ll128", "maco_one_shot_64", "maco_push_64", "maco_push_128")
METHODS: dict[str, dict[str, Method]] = {
    MATMUL: {
        **{name: Method("in_place", backend, is_peer=True) for name, backend in _PEER_BACKENDS.items()},
        "chunked2_nccl": _chunked("nccl", 2, is_peer=True),
        "chunked4_nccl": _chunked("nccl", 4, is_peer=True),
        "async_tp": Method("async_tp", is_peer=True),
        **{f"sequential_{backend}": _sequential(backend) for backend in OUR_BACKENDS},
        **{
            f"chunked{num_chunks}_{backend}": _chunked(backend, num_chunks)
            for backend in ("maco_staged_8", "maco_push_64", "gloo")
            for num_chunks in (2, 4, 8)
        },
        "signalled": Method("retired", "maco_staged_8"),
        "persistent": Method("plan", plan={"technique": "persistent"}, min_rows=MAX_ROWS + 1),
        "decode": Method("plan", plan={"technique": "decode"}, max_rows=MAX_ROWS),
        "auto_untuned": Method("untuned"),
        "auto": Method("auto"),
    },
    CHAIN: {
        **{
            name: Method("in_place", backend, norm="one_kernel", is_peer=True)
            for name, backend in _PEER_BACKENDS.items()
        },
        "sequential_nccl_two_kernels": Method("in_place", "nccl", norm="two_kernels", is_peer=True),
        "fused_norm": Method("norm", norm="fused"),
        "auto": Method("norm", norm="auto"),
    },
}
# How the persistent kernel is launched again and again: issued one by one, and replayed from a CUDA graph.
HAND_OVER_LAUNCHES = ("eager", "replayed")
# What the speedups are over: plain code over the default all-reduce.
BASE = {"cuda": "sequential_nccl", "cpu": "sequential_gloo"}
# Compared above FEW_ROWS, up to it, and in the chain.
MANY_ROWS_METHODS = {
    "cpu": ["sequential_gloo", "chunked2_gloo", "chunked4_gloo", "auto_untuned", "auto"],
    "cuda": [
        "sequential_nccl", "sequential_nccl_symmetric", "sequential_two_shot", "sequential_vllm_custom",
        "chunked2_nccl", "chunked4_nccl", "async_tp", "sequential_maco_ll128", "sequential_maco_push_128",
        *(f"chunked{number}_{backend}" for backend in ("maco_staged_8", "maco_push_64") for number in (2, 4)),
        "persistent", "auto_untuned", "auto",
    ],
}  # fmt: skip
FEW_ROWS_METHODS = {
    "cpu": ["sequential_gloo", "auto_untuned", "auto"],
    "cuda": [
        "sequential_nccl", "sequential_nccl_symmetric", "sequential_one_shot", "sequential_two_shot",
        "sequential_vllm_custom", "sequential_maco_ll", "sequential_maco_ll128", "sequential_maco_push_64",
        "persistent", "decode", "auto_untuned", "auto",
    ],
}  # fmt: skip
CHAIN_METHODS = {
    "cpu": ["sequential_gloo", "auto"],
    "cuda": [
        "sequential_nccl", "sequential_nccl_two_kernels", "sequential_nccl_symmetric", "sequential_one_shot",
        "sequential_two_shot", "sequential_vllm_custom", "fused_norm", "auto",
    ],
}  # fmt: skip
# All-reduces timed alone, of which the fastest is part of the ideal: at many rows, and at few every arm's.
IDEAL_BACKENDS = {
    "cpu": (["gloo"], ["gloo"]),
    "cuda": (
        ["nccl", "nccl_symmetric", "symm_mem_two_shot", "vllm_custom", "maco_ll128", "maco_push_64", "maco_push_128"],
        [
            "nccl", "nccl_symmetric", "symm_mem_one_shot", "symm_mem_two_shot", "vllm_custom", "maco_ll",
            "maco_ll128", "maco_push_64",
        ],
    ),
}  # fmt: skip
TIMELINE_METHODS = {
    "cpu": ["sequential_gloo", "chunked2_gloo"],
    "cuda": ["sequential_nccl", "chunked4_maco_staged_8", "persistent"],
}
# Of this library's making, so they have to stand a thousand repeats and ten thousand calls.
ENDURANCE_METHODS = {
    "cpu": ["chunked2_gloo", "auto"],
    "cuda": [
        "sequential_maco_push_64", "chunked4_maco_staged_8", "persistent", "decode", "auto", "fused_norm",
    ],
}  # fmt: skip
