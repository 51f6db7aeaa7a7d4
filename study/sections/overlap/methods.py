"""What section 1 compares, without torch: the published configurations and the methods of each protocol."""

from maco_lib.overlap.plan import DEFAULT_BACKEND, Plan

# Backends that hold more SMs, or for longer, than a matmul that does not know of it can do without: also measured with
# as many reserved for them.
LEFT_TO = {"maco_pull_8": 8, "maco_staged_12": 12}
MIB = 2**20

# The published configurations: bytes of the all-reduced tensor, n of the n×n matmul (bf16 both).
PUBLISHED = {
    "Small compute, medium comm": (8 * MIB, 1024),
    "Medium compute, large comm": (32 * MIB, 2048),
    "Large compute, large comm": (32 * MIB, 4096),
    "Large compute, very large comm": (64 * MIB, 4096),
}
SWEEP = "sweep"

# A plan, or "auto" for the one that the planner finds.
METHODS: dict[str, dict[str, Plan | str]] = {
    "device": {
        "sequential": Plan(overlapped=False),
        "two_stream": Plan(urgent=False),
        "two_stream_matmul_first": Plan(urgent=False, compute_first=True),
        "two_stream_priority": Plan(),
        "two_stream_cta4": Plan("nccl_cta4", urgent=False),
        "two_stream_cta8": Plan("nccl_cta8", urgent=False),
        "two_shot_stream": Plan("symm_mem_two_shot"),
        **{
            f"{backend}_stream": Plan(backend)
            for backend in (
                "nccl_symmetric",
                "vllm_custom",
                "maco_pull_8",
                "maco_push_64",
                "maco_push_128",
                "maco_staged_8",
                "maco_staged_12",
                "copy_engine",
            )
        },
        **{f"{backend}_left": Plan(backend, leaves=num_sms) for backend, num_sms in LEFT_TO.items()},
        "auto": "auto",
    },  # fmt: skip
    "published": {
        "sequential": Plan(overlapped=False),
        "sequential_unsynchronised": Plan(overlapped=False),
        "two_stream": Plan(urgent=False),
    },
}
# (protocol, method) whose host waits between the two steps.
HOST_WAITS = {("published", "sequential")}
# Names without code: stored tables hold them, of backends that lost wherever they were measured (docs/tried.md).
RETIRED = ("copy_engine_stream",)
DEVICE_METHODS = {
    "cpu": ["sequential", "two_stream", "auto"],
    "cuda": [name for name in METHODS["device"] if name not in RETIRED],
}
SWEEP_METHODS = {
    "cpu": ["sequential", "two_stream", "auto"],
    "cuda": [
        "sequential", "two_stream", "two_shot_stream", "maco_push_64_stream", "maco_staged_8_stream",
        "maco_pull_8_left", "auto",
    ],
}  # fmt: skip
# What was compared before there were plans, and is asked for where no methods are named: what was measured then, on
# machines that are not at hand, stays what it is.
FIRST_METHODS = {"cpu": ["sequential", "two_stream"], "cuda": [
    "sequential", "two_stream", "two_stream_matmul_first", "two_stream_priority", "two_stream_cta4", "two_stream_cta8",
    "two_shot_stream",
]}  # fmt: skip
FIRST_SWEEP_METHODS = {"cpu": ["sequential", "two_stream"], "cuda": ["sequential", "two_stream", "two_shot_stream"]}
# All-reduces timed alone in the device protocol, besides those of the methods: the best is part of the ideal. In the
# published configurations all there are; in the sweep, to save time, those that are meant to be fast alone.
IDEAL_BACKENDS = {
    "cpu": ["gloo"],
    "cuda": [
        "nccl", "nccl_cta4", "nccl_cta8", "nccl_symmetric", "symm_mem_one_shot", "symm_mem_two_shot",
        "maco_pull_8", "maco_push_64", "maco_push_128", "maco_staged_8", "maco_staged_12", "vllm_custom",
    ],
}  # fmt: skip
SWEEP_IDEAL_BACKENDS = {
    "cpu": ["gloo"],
    "cuda": ["nccl", "nccl_symmetric", "symm_mem_one_shot", "symm_mem_two_shot", "maco_push_64", "maco_push_128"],
}
# What is also timed as eager code issues it: the published technique and two that take few SMs, and how each kind of
# device launches them. On a CPU there is nothing but the host.
EAGER_METHODS = {
    "cpu": ["sequential", "two_stream", "auto"],
    "cuda": ["sequential", "two_stream", "maco_push_64_stream", "maco_staged_8_stream", "auto"],
}
LAUNCHED = {"cpu": ["eager"], "cuda": ["graph", "eager"]}

__all__ = [
    "DEFAULT_BACKEND", "DEVICE_METHODS", "EAGER_METHODS", "FIRST_METHODS", "FIRST_SWEEP_METHODS", "HOST_WAITS",
    "IDEAL_BACKENDS", "LAUNCHED", "METHODS", "PUBLISHED", "RETIRED", "SWEEP", "SWEEP_IDEAL_BACKENDS", "SWEEP_METHODS",
]  # fmt: skip
