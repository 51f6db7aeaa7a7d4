"""What code and packages are here, to tell whether something kept was made by others."""

import hashlib
import importlib.metadata
import pathlib


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def digest(paths: list[pathlib.Path], root: pathlib.Path) -> str:
    """SHA-256 over the names (relative to `root`) and contents of `paths`."""
    total = hashlib.sha256()
    for path in paths:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return total.hexdigest()
