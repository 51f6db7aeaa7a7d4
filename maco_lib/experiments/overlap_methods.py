"""What section 1 compares, without torch: the published configurations and the methods of each protocol."""

from dataclasses import dataclass

MIB = 2**20

# The published configurations: bytes of the all-reduced tensor, n of the n×n matmul (bf16 both).
PUBLISHED = {
    "Small compute, medium comm": (8 * MIB, 1024),
    "Medium compute, large comm": (32 * MIB, 2048),
    "Large compute, large comm": (32 * MIB, 4096),
    "Large compute, very large comm": (64 * MIB, 4096),
}
SWEEP = "sweep"


@dataclass(frozen=True)
class Method:
    """How the two steps are run. `backend`: "" for the device's default; `urgent`: on a stream of the highest priority;
    `matmul_first`: issued after the matmul (GPUs only); `host_wait`: the host waits between the two steps."""

    backend: str = ""
    overlapped: bool = True
    urgent: bool = False
    matmul_first: bool = False
    host_wait: bool = False


METHODS = {
    "device": {
        "sequential": Method(overlapped=False),
        "two_stream": Method(),
        "two_stream_matmul_first": Method(matmul_first=True),
        "two_stream_priority": Method(urgent=True),
        "two_stream_cta4": Method("nccl_cta4"),
        "two_stream_cta8": Method("nccl_cta8"),
        "two_shot_stream": Method("symm_mem_two_shot", urgent=True),
    },
    "published": {
        "sequential": Method(overlapped=False, host_wait=True),
        "sequential_unsynchronised": Method(overlapped=False),
        "two_stream": Method(),
    },
}
SWEEP_METHODS = {"cpu": ["sequential", "two_stream"], "cuda": ["sequential", "two_stream", "two_shot_stream"]}
DEVICE_METHODS = {"cpu": ["sequential", "two_stream"], "cuda": list(METHODS["device"])}
DEFAULT_BACKEND = {"cpu": "gloo", "cuda": "nccl"}
# All-reduces timed alone in every point of the device protocol: the best of them is part of the ideal.
IDEAL_BACKENDS = {"cpu": ["gloo"], "cuda": ["nccl", "symm_mem_one_shot", "symm_mem_two_shot"]}
