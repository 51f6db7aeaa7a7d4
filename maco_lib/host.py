"""What the library asks of the host: names of its GPUs, versions of its packages."""

import importlib.metadata
import re

BRANDS = {"nvidia", "tesla", "geforce", "quadro"}
VARIANTS = {"ti", "super", "ada", "blackwell"}


def short_gpu_name(name: str) -> str:
    """The model without brand, form factor and memory: "NVIDIA A100-SXM4-80GB" -> "a100"."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word and word not in BRANDS]
    model = next((index for index, word in enumerate(words) if re.search(r"\d", word)), len(words) - 1)
    return "-".join(words[: model + 1] + [word for word in words[model + 1 :] if word in VARIANTS]) or "gpu"


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
