"""What this machine is: its devices, its name in the study, and an identity that tells two equal machines apart."""

import collections
import hashlib
import math
import os
import pathlib
import platform
import re
import secrets
import socket
from dataclasses import dataclass
from typing import Any, Literal

from maco_lib import nvml
from maco_lib.host import short_gpu_name
from study.harness import cgroup, gpus


@dataclass(frozen=True)
class Machine:
    """A machine as the study sees it.

    `kind`: "cuda" or "cpu". `num_devices`: GPUs this process may use, or CPU cores. `name`: "h200-x2", "cpu-2".
    `identity`: 16 hex digits of this host. `memory_bytes`: memory of one GPU, or the RAM this process may use.
    `description`: what a reader wants to know of the hardware and the system; no key is secret or names the host.
    """

    kind: Literal["cuda", "cpu"]
    num_devices: int
    name: str
    identity: str
    memory_bytes: int
    description: dict[str, Any]


def this_machine() -> Machine:
    """The machine this process runs on; GPUs are those that CUDA_VISIBLE_DEVICES leaves visible."""
    description = describe_host()
    with nvml.session() as answers:
        handles = nvml.handles() if answers else []
        identity = host_identity(gpus.all_uuids() if answers else [], description["cpu"])
        if handles:
            description = {**gpus.describe(handles), **description}
            name = machine_name(description["gpus"])
            return Machine("cuda", len(handles), name, identity, description["gpu_memory_bytes"], description)
    cores = description["cores"]
    return Machine("cpu", cores, f"cpu-{cores}", identity, description["ram_bytes"], description)


def machine_name(gpus: list[str]) -> str:
    """A folder name for a set of GPUs: ["NVIDIA H200", "NVIDIA H200"] -> "h200-x2"."""
    counts = collections.Counter(map(short_gpu_name, gpus))
    return "-".join(f"{name}-x{count}" for name, count in counts.items())


def host_identity(gpu_uuids: list[str], cpu: str) -> str:
    """16 hex digits that stay the same on this host and differ on every other one.

    Images of virtual machines are cloned with their /etc/machine-id, so a random token kept in the user's state folder
    is part of it.
    """
    machine_id = pathlib.Path("/etc/machine-id")
    parts = [
        machine_id.read_text(encoding="utf-8").strip() if machine_id.exists() else "",
        *gpu_uuids,
        cpu,
        host_token(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def host_token() -> str:
    """The random token of this host, made on first use in $XDG_STATE_HOME/maco/host-id."""
    try:
        state = os.environ.get("XDG_STATE_HOME") or pathlib.Path("~/.local/state").expanduser()
        path = pathlib.Path(state) / "maco" / "host-id"
        fresh = path.with_name(f"host-id.{os.getpid()}.{secrets.token_hex(4)}")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(secrets.token_hex(16), encoding="utf-8")
            try:
                os.link(fresh, path)  # fails if another process was first, whose token then counts
            except FileExistsError:
                return path.read_text(encoding="utf-8")
            finally:
                fresh.unlink()
        return path.read_text(encoding="utf-8")
    except (OSError, RuntimeError):
        # There is no home (RuntimeError), or none to write in: the host is then told apart until its next boot.
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return socket.gethostname() + boot


def describe_host() -> dict[str, Any]:
    """CPU, memory and system of this host."""
    return {
        "cpu": cpu_model(),
        "cores": num_cores(),
        "host_cores": os.cpu_count(),
        "ram_bytes": ram_bytes(),
        "os": os_name(),
        "kernel": platform.release(),
        "container": container(),
    }


def cpu_model() -> str:
    """The processor's name as Linux shows it, else the architecture's."""
    path = pathlib.Path("/proc/cpuinfo")
    match = re.search(
        r"^(?:model name|Model)\s*:\s*(.+)$", path.read_text(encoding="utf-8") if path.exists() else "", re.MULTILINE
    )
    return match.group(1).strip() if match else platform.machine()


def num_cores(proc: pathlib.Path = cgroup.PROC) -> int:
    """CPU cores this process may use: its affinity, and the CPU quota of its control groups. What everything asks."""
    cores, limit = len(os.sched_getaffinity(0)), cgroup.cpu_limit(proc)
    return cores if limit is None else min(cores, max(1, math.ceil(limit)))


def ram_bytes(proc: pathlib.Path = cgroup.PROC) -> int:
    """RAM this process may use: the host's, or the limit of its control groups. What everything asks."""
    total, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), cgroup.memory_limit(proc)
    return total if limit is None else min(total, limit)


def os_name() -> str:
    """The distribution's name, "Debian GNU/Linux 12 (bookworm)"."""
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def container() -> str | None:
    """The kind of container this process runs in, None outside one (as far as the common markers tell)."""
    markers = {"/.dockerenv": "docker", "/run/.containerenv": "podman", "/.singularity.d": "singularity"}
    for marker, kind in markers.items():
        if os.path.exists(marker):
            return kind
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    return None
