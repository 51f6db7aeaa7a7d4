"""Files that land whole or not at all, and the folder everything lives in."""

import hashlib
import json
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
# What `execute` prints before a notebook's error, for the runner to find.
NOTEBOOK_FAILED = "The notebook failed:"


class DataError(Exception):
    """A stored file is missing, damaged, or not what was written; the message names it and what to do."""


def study_root() -> pathlib.Path:
    """The folder that holds `data/`, `figures/` and `REPORT.md`: `MACO_ROOT`, or the checkout this package lies in."""
    return pathlib.Path(os.environ.get("MACO_ROOT") or CHECKOUT)


def default_cache() -> pathlib.Path | None:
    """$MACO_CACHE, else ~/.cache/maco; None for a user without a home."""
    try:
        return pathlib.Path(os.environ.get("MACO_CACHE") or pathlib.Path.home() / ".cache" / "maco")
    except RuntimeError:
        return None


def without_places(text: str) -> str:
    """`text` without where this machine keeps its files: the checkout, the interpreter, temporary files."""
    places = {f"{CHECKOUT}/": "", sys.prefix: "<python>", tempfile.gettempdir(): "<tmp>"}
    for place, name in sorted(places.items(), key=lambda it: -len(it[0])):  # .venv lies in the checkout
        # As a whole path, not inside a longer word: base64 is full of slashes.
        end = "" if place.endswith("/") else r"(?![\w+=.-])"
        text = re.sub(rf"(?<![\w+/=.-]){re.escape(place)}{end}", name, text)
    return text


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Write a temporary file beside `path`, then rename it over: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: pathlib.Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
