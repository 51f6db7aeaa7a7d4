"""What control groups leave a process, on trees of files as the kernel shows them."""

import os
import pathlib

import pytest

from study.harness import cgroup, machine
from study.results import launch


@pytest.fixture
def host(tmp_path):
    """make(memberships, {point: (root, kind, options)}, files): a process's /proc/self, its mounts within."""

    def make(memberships: list[str], mounts: dict, files: dict[str, str]) -> pathlib.Path:
        lines = [
            f"30 23 0:26 {root} {tmp_path}/{point} rw,relatime - {kind} {kind} {options}"
            for point, (root, kind, options) in mounts.items()
        ]
        (tmp_path / "mountinfo").write_text("\n".join(["22 1 8:1 / / rw - ext4 /dev/sda1 rw", *lines]))
        (tmp_path / "cgroup").write_text("\n".join(memberships))
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return tmp_path

    return make


V2 = {"cg": ("/", "cgroup2", "rw,nsdelegate")}
V1 = {"cg/cpu": ("/", "cgroup", "rw,cpu,cpuacct"), "cg/memory": ("/", "cgroup", "rw,memory")}
UNLIMITED_V1 = str((1 << 63) - 4096)


@pytest.mark.parametrize(
    ("memberships", "mounts", "files", "cpu", "memory"),
    [
        # Version 2: a container's own root; a group within; the tightest on the way up; none.
        (["0::/"], V2, {"cg/cpu.max": "100000 100000", "cg/memory.max": "4096"}, 1.0, 4096),
        (["0::/a/b"], V2, {"cg/a/b/cpu.max": "max 100000", "cg/a/cpu.max": "150000 100000"}, 1.5, None),
        (["0::/a/b"], V2, {"cg/a/b/memory.max": "9000", "cg/a/memory.max": "8000", "cg/c/memory.max": "1"}, None, 8000),
        (["0::/"], V2, {"cg/cpu.max": "max 100000", "cg/memory.max": "max"}, None, None),
        # Version 1: own hierarchies of cpu and memory, -1 and a very large number for no limit.
        (
            ["4:memory:/a", "1:cpu,cpuacct:/a"], V1,
            {"cg/cpu/a/cpu.cfs_quota_us": "50000", "cg/cpu/a/cpu.cfs_period_us": "100000",
             "cg/memory/a/memory.limit_in_bytes": "4096", "cg/memory/memory.limit_in_bytes": UNLIMITED_V1}, 0.5, 4096,
        ),
        (
            ["4:memory:/", "1:cpu,cpuacct:/"], V1,
            {"cg/cpu/cpu.cfs_quota_us": "-1", "cg/cpu/cpu.cfs_period_us": "100000",
             "cg/memory/memory.limit_in_bytes": UNLIMITED_V1}, None, int(UNLIMITED_V1),
        ),
        # Docker with version 1: the group's path is the host's, what is mounted is the container's own group.
        (
            ["1:cpu,cpuacct:/docker/c0ffee"], {"cg/cpu": ("/docker/c0ffee", "cgroup", "rw,cpu,cpuacct")},
            {"cg/cpu/cpu.cfs_quota_us": "200000", "cg/cpu/cpu.cfs_period_us": "100000"}, 2.0, None,
        ),
        # Both versions mounted; a group outside of the mounted tree; a mount point with a blank.
        (["1:cpu:/", "0::/"], {**V1, **V2}, {"cg/cpu.max": "300000 100000"}, 3.0, None),
        (["0::/../other"], V2, {"cg/cpu.max": "100000 100000"}, 1.0, None),
        (["0::/"], {r"c\040g": ("/", "cgroup2", "rw")}, {"c g/cpu.max": "100000 100000"}, 1.0, None),
        ([], {}, {}, None, None),
    ],
)  # fmt: skip
def test_the_tightest_limit_counts(host, memberships, mounts, files, cpu, memory):
    proc = host(memberships, mounts, files)
    assert (cgroup.cpu_limit(proc), cgroup.memory_limit(proc)) == (cpu, memory)


def test_cores_and_memory_have_one_source(host, monkeypatch):
    proc = host(["0::/"], V2, {"cg/cpu.max": "100000 100000", "cg/memory.max": "123456789"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert (machine.num_cores(proc), machine.ram_bytes(proc)) == (1, 123456789)
    monkeypatch.setattr(cgroup, "cpu_limit", lambda proc: 1.0)
    monkeypatch.setattr(cgroup, "memory_limit", lambda proc: 123456789)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    here = machine.describe_host()
    assert (here["cores"], here["ram_bytes"]) == (1, 123456789)
    environment = launch.child_environment(machine.this_machine(), num_ranks=2)
    assert environment["OMP_NUM_THREADS"] == "1", "two ranks of one core's worth of time"


def test_nothing_else_counts_cores_or_memory():
    root = pathlib.Path(machine.__file__).parents[2]
    asking = {
        str(path.relative_to(root))
        for folder in ("maco_lib", "study")
        for path in (root / folder).rglob("*.py")
        for question in ("sched_getaffinity(", "cpu_count(", "virtual_memory().total")
        if question in path.read_text(encoding="utf-8")
    }
    # The engines choose among the cores which ones, and take as many as there are.
    assert asking == {"study/harness/machine.py", "study/sections/inference/engines/engine.py"}
