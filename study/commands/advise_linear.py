"""What `linear_all_reduce` gives for a row-parallel layer, from the nearest one that a machine measured."""

import math
from typing import TYPE_CHECKING

from study.sections.linear_all_reduce.methods import MATMUL

if TYPE_CHECKING:  # as in `advise`
    import pandas as pd

TABLE, PLANNER = "linear_all_reduce", "auto"
HEAD = "As one operation, for the all-reduce that waits for the matmul's result; no other work is needed beside it:"
USAGE = "To use it: from maco_lib.overlap import linear_all_reduce\n  y = linear_all_reduce(x, weight)   every rank"
SIZES = ("m", "n", "k")


def row_parallel(model_name: str, tokens: int) -> dict[str, tuple[int, int, int]]:
    """(m, n, k of all ranks) of a model's row-parallel layers. Raises ValueError on a name that is not known."""
    from study.models import model_dimensions

    model = model_dimensions(model_name)
    widths = {"o_proj": model.heads * model.head_dim, "down_proj": model.intermediate}
    return {layer: (tokens, model.hidden, k) for layer, k in widths.items()}


def nearest(rows: "pd.DataFrame", shape: tuple[int, int, int]) -> "pd.Series":
    """The row whose m, n and k differ from `shape` by the least factors, all three together."""
    factors = [rows[name].div(want).map(math.log).abs() for name, want in zip(SIZES, shape, strict=True)]
    distance = sum(factors)
    return rows.loc[distance.idxmin()]


def line(rows: "pd.DataFrame", shape: tuple[int, int, int], tp: int) -> str:
    """What the planner's plan gave at the nearest measured shape; says how far that is from `shape`."""
    planned = rows[(rows["operation"] == MATMUL) & (rows["method"] == PLANNER) & rows["correct"] & (rows["tp"] == tp)]
    if planned.empty:
        return f"not measured with tp {tp}"
    row = nearest(planned, shape)
    factors = {name: row[name] / want for name, want in zip(SIZES, shape, strict=True)}
    away = ", ".join(f"{factor:.3g} times your {name}" for name, factor in factors.items() if factor != 1)
    return (
        f"{row['t_base_us']:.1f} µs one after the other over the default all-reduce, {row['time_us']:.1f} µs by "
        f"{row['plan']}: {row['t_base_us'] / row['time_us']:.2f}x, {row['fraction_of_ideal']:.0%} of the ideal "
        f"(matmul alone {row['t_matmul_us']:.1f} µs)\n"
        f"    measured at {row['layer']}, M = {row['m']}: {away or 'your shape'}"
    )


def advice(rows: "pd.DataFrame | None", shapes: dict[str, tuple[int, int, int]], tp: int, machine: str) -> str:
    """A line for each of `shapes` (name -> m, n, k of all ranks); rows: the machine's table, None where it has none."""
    if rows is None:
        return f"{HEAD}\n  not measured on {machine}: python -m study run --only {TABLE}"
    lines = [f"  {name + ': ' if name else ''}{line(rows, shape, tp)}" for name, shape in shapes.items()]
    return "\n".join([HEAD, *lines, USAGE])
