"""What a reader wants to know of the GPUs this process may use: links, topology, memory, driver; by `maco_lib.nvml`."""

import itertools
from typing import Any

import pynvml

from maco_lib.nvml import ask, nvlink_status

# Data rate of one NVLink per direction in GB/s, by compute capability: NVIDIA's data sheets divided by their number of
# links (P100 80/4, V100 150/6, A100 300/12, RTX A6000 56.25/4, H100 and H200 450/18, B200 and B300 900/18). NVML
# reports the signalling rate (26.562 GB/s for 25), which no payload reaches, so it is kept beside this one and not used
# as the limit.
NVLINK_GB_PER_S = {
    (6, 0): 20.0, (7, 0): 25.0, (8, 0): 25.0, (8, 6): 14.0625, (9, 0): 25.0, (10, 0): 50.0, (10, 3): 50.0,
}  # fmt: skip
# Data rate of one PCIe lane per direction in GB/s after line coding, by generation (PCI-SIG).
PCIE_LANE_GB_PER_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
COMMON_ANCESTOR = {0: "internal", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}


def all_uuids() -> list[str]:
    """UUIDs of every GPU of the host, visible to CUDA or not."""
    count = pynvml.nvmlDeviceGetCount()
    return sorted(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count))


def active_links(handle) -> list[int]:
    """Numbers of the NVLinks of one GPU that are up."""
    links = range(pynvml.NVML_NVLINK_MAX_LINKS)
    return [link for link in links if ask(pynvml.nvmlDeviceGetNvLinkState, handle, link) == 1]


def link_limit_gb_per_s(gpus: list) -> tuple[str, float | None]:
    """How the first GPU reaches its peers ("NVLink", "PCIe", "unknown"), and the limit in GB/s per direction."""
    links = active_links(gpus[0])
    if links:
        rate = NVLINK_GB_PER_S.get(tuple(pynvml.nvmlDeviceGetCudaComputeCapability(gpus[0])))
        return "NVLink", None if rate is None else len(links) * rate
    # Containers may hide the links: PCIe is the limit only where the driver says that there is no NVLink.
    joined = [nvlink_status(gpus[0], peer) for peer in gpus[1:]]
    if pynvml.NVML_P2P_STATUS_OK in joined:
        return "NVLink", None
    if None in joined:
        return "unknown", None
    generation = ask(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, gpus[0])
    width = ask(pynvml.nvmlDeviceGetMaxPcieLinkWidth, gpus[0])
    lane = PCIE_LANE_GB_PER_S.get(generation)
    return "PCIe", None if lane is None or not width else lane * width


def nvlink_signalling_gb_per_s(handle) -> float | None:
    """The signalling rate of one NVLink as NVML reports it, in GB/s."""
    fields = ask(pynvml.nvmlDeviceGetFieldValues, handle, [pynvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON])
    if not fields or fields[0].nvmlReturn != pynvml.NVML_SUCCESS or not fields[0].value.uiVal:
        return None
    return fields[0].value.uiVal / 1000


def topology(gpus: list) -> dict[str, str]:
    """How each pair of GPUs is joined, as `nvidia-smi topo -m` names it: {"0-1": "NV18"}."""
    pairs = {}
    for (i, first), (j, second) in itertools.combinations(enumerate(gpus), 2):
        if nvlink_status(first, second) == pynvml.NVML_P2P_STATUS_OK:
            pairs[f"{i}-{j}"] = f"NV{_links_between(first, second) or ' (number not told)'}"
        else:
            level = ask(pynvml.nvmlDeviceGetTopologyCommonAncestor, first, second)
            pairs[f"{i}-{j}"] = COMMON_ANCESTOR.get(level, "unknown")
    return pairs


def _links_between(first, second) -> int:
    # Behind an NVSwitch the far end of a link is the switch, so every link that is up serves every pair.
    address = pynvml.nvmlDeviceGetPciInfo(second).busId
    links = active_links(first)
    remote = [ask(pynvml.nvmlDeviceGetNvLinkRemotePciInfo, first, link) for link in links]
    direct = sum(info is not None and info.busId == address for info in remote)
    return direct or len(links)


def describe(gpus: list) -> dict[str, Any]:
    """Names, driver, links and memory of `gpus`, for a reader; entries the driver does not answer are None."""
    first = gpus[0]
    version = ask(pynvml.nvmlSystemGetCudaDriverVersion_v2)
    link, limit = link_limit_gb_per_s(gpus)
    return {
        "gpus": [pynvml.nvmlDeviceGetName(handle) for handle in gpus],
        "gpu_memory_bytes": pynvml.nvmlDeviceGetMemoryInfo(first).total,
        "compute_capability": ".".join(map(str, pynvml.nvmlDeviceGetCudaComputeCapability(first))),
        "driver": ask(pynvml.nvmlSystemGetDriverVersion),
        "cuda_driver": None if version is None else f"{version // 1000}.{version % 1000 // 10}",
        "topology": topology(gpus),
        "link": link,
        "num_nvlinks": len(active_links(first)),
        "nvlink_signalling_gb_per_s": nvlink_signalling_gb_per_s(first),
        "link_limit_gb_per_s": limit,
        "pcie_generation": ask(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, first),
        "pcie_width": ask(pynvml.nvmlDeviceGetMaxPcieLinkWidth, first),
        "power_limit_w": _thousandth(ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, first)),
        "max_sm_clock_mhz": ask(pynvml.nvmlDeviceGetMaxClockInfo, first, pynvml.NVML_CLOCK_SM),
    }


def _thousandth(value: int | None) -> float | None:
    return None if value is None else value / 1000
