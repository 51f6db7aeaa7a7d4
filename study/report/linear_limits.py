"""Section 5: what limits each technique."""

import pandas as pd

from study.drawing.looks import look
from study.report.linear import cells, fastest
from study.report.report_tables import ABSENT, table, us
from study.results.evidence import Evidence
from study.sections.linear_all_reduce.methods import MATMUL

# Of cuBLAS's matmuls at many rows on Hopper GPUs: what the waves of a matmul are counted in.
TILE = (128, 256)
LIMITS_ROWS = 4096


def limits(machine: Evidence) -> str:
    """At many rows: how the matmul fills the GPU, what cutting it costs, and what each technique leaves exposed."""
    found = cells(machine, MATMUL)
    sizes = {cell.m for cell in found}
    chosen = LIMITS_ROWS if LIMITS_ROWS in sizes else max(sizes)
    body = []
    for cell in (cell for cell in found if cell.m == chosen):
        first = cell.rows.iloc[0]
        kinds = {
            "sequential": cell.sequential,
            "chunked": fastest(cell.rows[cell.rows["method"].str.startswith("chunked") & ~cell.rows["is_peer"]]),
            **{name: cell.rows.loc[name] if name in cell.rows.index else None for name in ("signalled", "persistent")},
        }
        cut = kinds["chunked"]
        cost = ABSENT
        if cut is not None and pd.notna(cut["t_matmul_chunked_us"]):
            cost = f"{cut['t_matmul_chunked_us'] / cut['t_matmul_us'] - 1:+.1%} ({look(cut['method']).label})"
        body.append([cell.layer, waves(first), us(first["t_matmul_us"]), us(first["t_comm_us"]), cost,
                     *(ABSENT if row is None else exposed(row) for row in kinds.values())])  # fmt: skip
    headers = [f"layer, M = {chosen}", "waves of tiles", "matmul", "best all-reduce", "cutting the matmul",
               *(f"ECT, {name}" for name in ("sequential", "chunked", "signalled", "persistent"))]  # fmt: skip
    return table(body, headers)


def waves(row: pd.Series) -> str:
    """How often the matmul's tiles fill all SMs, and how full the last wave leaves them on average."""
    if not row["num_sms"]:
        return ABSENT
    tiles = -(-row["m"] // TILE[0]) * -(-row["n"] // TILE[1])
    count = tiles / row["num_sms"]
    return f"{count:.2f}, {count / -(-tiles // row['num_sms']):.0%} filled"


def exposed(row: pd.Series) -> str:
    """The exposed communication time, and how much of the best all-reduce alone that is."""
    return f"{us(row['ect_us']) if row['ect_us'] > 0 else us(0.0)}, {row['ect_us'] / row['t_comm_us']:.0%}"
