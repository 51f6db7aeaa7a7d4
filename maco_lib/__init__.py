"""MACO: how much of the ideal gain does overlapping communication with computation really get, and by which technique?

The public names are imported on first use, so that tools that only read stored data never load torch.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "overlap": "maco_lib.overlap.streams",  # run a computation and a collective side by side
    "start": "maco_lib.overlap.streams",  # start a collective, go on, wait later
    "Handle": "maco_lib.overlap.streams",  # a collective in flight
    "this_machine": "maco_lib.machine",  # what this machine is
}
__all__ = ["Handle", "overlap", "start", "this_machine"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"maco_lib has no {name!r}; its public names are {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
