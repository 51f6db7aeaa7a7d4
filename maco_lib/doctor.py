"""What this machine has of what the library needs: `python -m maco_lib doctor`.

Looks at metadata and the driver only; torch is not loaded, and missing packages are a finding.
"""

import pathlib
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from maco_lib.host import installed_version, short_gpu_name

# Oldest and first too new version by distribution, None where any does.
PACKAGES = {"torch": ((2, 11), None), "numpy": (None, None), "nvidia-ml-py": (None, None)}
INSTALL = "pip install it"
PLANS = pathlib.Path(__file__).parent / "linear" / "tables"


@dataclass(frozen=True)
class Check:
    """One thing looked at: `ok` True, False (a section cannot run) or None (it can, with less); else a `remedy`."""

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""


def doctor() -> list[Check]:
    """Every check of the library on this machine, most basic first."""
    gpus = gpu_names()
    return [
        check_python(),
        *(check_package(name, *versions, INSTALL) for name, versions in PACKAGES.items()),
        *check_gpus(gpus),
        check_plans(gpus),
    ]


def tell(checks: Iterable[Check], only_problems: bool = False) -> int:
    """Print checks; returns 1 if something is missing."""
    words, missing = {True: "ok", None: "weak", False: "MISSING"}, []
    for check in checks:
        if check.ok is False:
            missing.append(check.name)
        if check.ok is True and only_problems:
            continue
        print(f"{words[check.ok]:<8} {check.name:<16} {check.detail}")
        if check.ok is not True:
            print(f"{'':<8} {'':<16} -> {check.remedy}")
    print(f"missing: {', '.join(missing)}" if missing else "Nothing is missing.")
    return 1 if missing else 0


def check_python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    ok = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Check("Python", ok, version, "Python 3.11, 3.12 or 3.13 is needed")


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version).group().split("."))


def check_package(name: str, oldest: tuple[int, ...] | None, too_new: tuple[int, ...] | None, remedy: str) -> Check:
    version = installed_version(name)
    if version is None:
        return Check(name, False, "not installed", remedy)
    found = numbers(version)
    if (oldest and found < oldest) or (too_new and found >= too_new):
        wanted = " ".join(
            f"{sign} {'.'.join(map(str, bound))}" for sign, bound in ((">=", oldest), ("<", too_new)) if bound
        )
        return Check(name, False, f"{version}, but {wanted} is needed", remedy)
    return Check(name, True, version)


def gpu_names() -> list[str]:
    """The GPUs this process may use, as the driver calls them."""
    if installed_version("nvidia-ml-py") is None:
        return []  # which is a finding of its own
    import pynvml

    from maco_lib import nvml

    with nvml.session() as answers:
        return [pynvml.nvmlDeviceGetName(handle) for handle in nvml.handles()] if answers else []


def check_gpus(gpus: list[str]) -> Iterator[Check]:
    """GPUs, whether all pairs have NVLink, NCCL; one check where there are no GPUs, which is no fault."""
    if not gpus:
        yield Check("GPUs", True, "none visible: ranks on CPUs sum over gloo")
        return
    yield Check("GPUs", len(gpus) > 1 or None, ", ".join(gpus), "one GPU has no peer to communicate with")
    if len(gpus) > 1:
        from maco_lib.nvml import without_nvlink

        apart = without_nvlink()
        detail = f"GPUs {apart} are not known to be joined by it" if apart else "between all pairs"
        yield Check("NVLink", not apart or None, detail, "choose others with CUDA_VISIBLE_DEVICES if there are")
    yield from check_cuda_packages(INSTALL)


def check_cuda_packages(remedy: str) -> Iterator[Check]:
    """NCCL, and whether torch is built for GPUs."""
    versions = {name: installed_version(name) for name in ("nvidia-nccl-cu13", "nvidia-nccl-cu12")}
    nccl = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield Check("NCCL", bool(nccl) or None, nccl or "no NCCL package (torch may bring its own)", remedy)
    torch = installed_version("torch") or ""
    yield Check("torch build", not torch.endswith("+cpu"), torch, "this torch cannot use the GPUs; " + remedy)


def check_plans(gpus: list[str]) -> Check:
    """Whether a table of plans is shipped for these GPUs."""
    if not gpus:
        return Check("plans", True, "on CPUs: matmul, then gloo, until tune_linear has measured others")
    models = {short_gpu_name(name) for name in gpus}
    known = sorted(path.stem for path in PLANS.glob("*.json"))
    here = [name for name in known if {name.rpartition("-x")[0]} == models]
    remedy = f"plans are shipped for {', '.join(known)}; tune_linear measures what is fastest here"
    return Check("plans", bool(here) or None, ", ".join(here) or f"none for {', '.join(sorted(models))}", remedy)
