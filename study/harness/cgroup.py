"""What the control groups of this process leave it of the host's cores and memory: version 1 and 2, at every level.

`proc` is where the kernel tells of this process: /proc/self, or a test's own folder.
"""

import pathlib
import re
from collections.abc import Iterator

PROC = pathlib.Path("/proc/self")


def cpu_limit(proc: pathlib.Path = PROC) -> float | None:
    """Cores' worth of time that the tightest group grants, 1.5 for instance; None where none limits it."""
    limits = []
    for folder in groups("cpu", proc):
        quota, period = [*read(folder / "cpu.max").split(), "", ""][:2]
        if not quota:
            quota, period = read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):  # neither "max" nor -1
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_limit(proc: pathlib.Path = PROC) -> int | None:
    """Bytes that the tightest group grants; None where none limits them (version 1 then says a very large number)."""
    texts = (
        read(folder / name) for folder in groups("memory", proc) for name in ("memory.max", "memory.limit_in_bytes")
    )
    return min((int(text) for text in texts if text.isdecimal()), default=None)


def groups(controller: str, proc: pathlib.Path = PROC) -> Iterator[pathlib.Path]:
    """The folders of this process's groups under `controller`, innermost first, up to the mounted root.

    In a container the group may lie outside of what is mounted: then the mounted root is the container's own.
    """
    paths = dict(memberships(proc))
    for line in read(proc / "mountinfo").splitlines():
        mount, _, system = line.partition(" - ")
        (_, _, _, root, point, *_), (kind, _, options, *_) = mount.split(" "), system.split(" ")
        if kind == "cgroup2":
            path = paths.get("")
        elif kind == "cgroup" and controller in options.split(","):
            path = paths.get(controller)
        else:
            continue
        top = pathlib.Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point))
        below = pathlib.PurePosixPath(path or root)
        inside = below.relative_to(root).parts if below.is_relative_to(root) and ".." not in below.parts else ()
        for depth in range(len(inside), -1, -1):
            yield top.joinpath(*inside[:depth])


def memberships(proc: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(controller, path of this process's group below the hierarchy's root); the controller of version 2 is ""."""
    for line in read(proc / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            yield controller, path


def read(path: pathlib.Path) -> str:
    """The file's text, "" where there is none or it may not be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
