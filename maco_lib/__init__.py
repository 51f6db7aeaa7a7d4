"""MACO: how much of the ideal gain does overlapping communication with computation really get, and by which technique?

    from maco_lib.overlap import overlap, start     run a computation and collectives side by side
    from maco_lib import comm, context, timing      the collectives; all that is kept of a group; timing primitives

Importing this package loads nothing else, so tools that only read stored data never load torch.
"""

__version__ = "0.1.0"
