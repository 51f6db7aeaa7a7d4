"""Append-only JSON lines: the record of finished points, and the events that feed the progress bar."""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any


def append_line(path: pathlib.Path, record: dict[str, Any], durable: bool = True) -> None:
    """Append one record as one line, in a single write; `durable`: it reached the disk when this returns."""
    data = (json.dumps(record, allow_nan=True, separators=(",", ":")) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, data)
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The records of `path`, oldest first; none if there is no such file. A line cut off by a kill is left out.

    Raises ValueError naming the file and line when a whole line is not JSON.
    """
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            return
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {number} is damaged: {error}") from None


class Tail:
    """The records that others append to `path`, each told once; a line that is not whole yet waits for its rest."""

    def __init__(self, path: pathlib.Path):
        self.path, self.offset = path, 0

    def new(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with open(self.path, "rb") as stream:
            stream.seek(self.offset)
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def drop_torn_line(path: pathlib.Path) -> None:
    """Cut off a last line that a kill left unfinished, so that the next append starts on a line of its own."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
