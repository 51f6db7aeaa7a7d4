"""What this machine has of what the library needs: `python -m maco_lib doctor`.

Looks at metadata and the driver only; torch is not loaded, and missing packages are a finding.
"""

import pathlib
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from maco_lib.machine import default_cache, short_gpu_name, this_machine
from maco_lib.versions import installed_version

# Oldest and first too new version by distribution, None where any does.
PACKAGES = {"torch": ((2, 11), None), "numpy": (None, None), "scipy": (None, None), "nvidia-ml-py": (None, None)}
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
    return [
        check_python(),
        *(check_package(name, *versions, INSTALL) for name, versions in PACKAGES.items()),
        *check_gpus(INSTALL),
        check_plans(),
        check_cache(),
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


def check_gpus(remedy: str) -> Iterator[Check]:
    """GPUs, driver, how the pairs are joined, NCCL; one check where there are no GPUs, which is no fault."""
    machine = this_machine()
    if machine.kind == "cpu":
        yield Check("GPUs", True, f"none visible: {machine.num_devices} CPU cores measure over gloo")
        return
    facts = machine.description
    yield Check(
        "GPUs",
        True if machine.num_devices > 1 else None,
        f"{', '.join(facts['gpus'])}; driver {facts['driver']}, CUDA {facts['cuda_driver']}",
        "one GPU has no peer to communicate with",
    )
    slow = [f"GPUs {pair}: {level}" for pair, level in facts["topology"].items() if not level.startswith("NV")]
    yield Check(
        "topology",
        None if slow else True,
        "; ".join(slow) or f"NVLink between all pairs, {facts['link_limit_gb_per_s']} GB/s per direction",
        "these pairs communicate over PCIe or the host; choose others with CUDA_VISIBLE_DEVICES if there are",
    )
    versions = {name: installed_version(name) for name in ("nvidia-nccl-cu13", "nvidia-nccl-cu12")}
    nccl = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield Check("NCCL", True if nccl else None, nccl or "no NCCL package (torch may bring its own)", remedy)
    torch = installed_version("torch") or ""
    yield Check("torch build", not torch.endswith("+cpu"), torch, "this torch cannot use the GPUs; " + remedy)


def check_plans() -> Check:
    """Whether a table of plans is shipped for these GPUs."""
    machine = this_machine()
    if machine.kind == "cpu":
        return Check("plans", True, "on CPUs: matmul, then gloo, until tune_linear has measured others")
    gpus = {short_gpu_name(name) for name in machine.description["gpus"]}
    known = sorted(path.stem for path in PLANS.glob("*.json"))
    here = [name for name in known if name.rpartition("-x")[0] in gpus] if len(gpus) == 1 else []
    remedy = f"plans are shipped for {', '.join(known)}; tune_linear measures what is fastest here"
    return Check("plans", bool(here) or None, ", ".join(here) or f"none for {', '.join(sorted(gpus))}", remedy)


def check_cache() -> Check:
    cache = default_cache()
    remedy = "every process that overlaps by plan='auto' calibrates anew: set MACO_CACHE"
    return Check("cache", True if cache else None, str(cache or "no home to keep one in"), remedy)
