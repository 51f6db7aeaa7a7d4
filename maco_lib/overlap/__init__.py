"""Overlap of communication with computation: how to run it (`streams`), what it can give (`model`, torch free)."""

import importlib

_HOMES = {
    "overlap": "maco_lib.overlap.streams",  # run a computation and a collective side by side
    "start": "maco_lib.overlap.streams",  # start a collective, go on, wait later
    "Handle": "maco_lib.overlap.streams",  # a collective in flight
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"maco_lib.overlap has no {name!r}; its public names are {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
