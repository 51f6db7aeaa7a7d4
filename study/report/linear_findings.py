"""The summary's finding about a matmul and its all-reduce as one operation."""

import pathlib

from study.published.criteria import LINEAR_MANY_ROWS, LINEAR_TARGETS
from study.report import clocks, linear_persistent
from study.report.found import Found, span
from study.report.linear import Cell, absent_peers, cells
from study.results.evidence import Evidence, Missing
from study.sections.linear_all_reduce.methods import CHAIN, MATMUL

# A batch that decodes.
DECODE_ROWS = 16


def one_kernel(evidence: Evidence, root: pathlib.Path) -> Found:
    """The persistent kernel at many rows against the ideal, sequential code and the fastest peer; the chain at few."""
    found = [
        (cell, row)
        for cell, row in linear_persistent.finished(evidence)
        if cell.base is not None and cell.peer is not None
    ]
    if not found:
        raise Missing(f"the persistent kernel and a peer finished no point of {LINEAR_MANY_ROWS} rows or more")
    parts = [row["fraction_of_ideal"] for _, row in found]
    over_base = [cell.base["time_us"] / row["time_us"] for cell, row in found]
    over_peer = [cell.peer["time_us"] / row["time_us"] for cell, row in found]
    apart = sum(row["time_hi_us"] < cell.rows.loc[cell.rows["is_peer"], "time_lo_us"].min() for cell, row in found)
    ends = dict.fromkeys(f"{value:.0%}" for value in (min(parts), max(parts)))
    sentence = (
        f"One kernel that multiplies and sums reaches {' to '.join(ends)} of the ideal at "
        f"M ≥ {LINEAR_MANY_ROWS}, {span(over_base)} over sequential NCCL and {span(over_peer)} over the fastest peer; "
        f"by the intervals it is ahead of every peer at {apart} of {len(found)} points"
    )
    lines = []
    wanted = LINEAR_TARGETS.get(int(found[0][1]["tp"]))
    if wanted:
        reached = sum(part >= wanted for part in parts)
        lines.append(f"{wanted:.0%} of the ideal or more at {reached} of {len(found)} points")
    absent = dict.fromkeys(name for operation in (MATMUL, CHAIN) for name in absent_peers(evidence, operation))
    if absent:
        lines.append(f"not among the peers, as not measured in this run: {', '.join(absent)}")
    lines += [*linear_persistent.shortfalls(evidence), *clocks.told(evidence), *decoding(evidence)]
    return Found(sentence, "linear_fraction", apart > 0, lines)


def decoding(evidence: Evidence) -> list[str]:
    """The chain at so few rows as a decoding batch has."""
    try:
        found = [cell for cell in cells(evidence, CHAIN) if cell.m <= DECODE_ROWS and complete(cell)]
    except Missing:
        return []
    if not found:
        return []
    over_base, over_peer = ([getattr(cell, before)["time_us"] / cell.best["time_us"] for cell in found]
                            for before in ("base", "peer"))  # fmt: skip
    # Of the whole interval: the chain's upper end below the lower one of the matmul that is but a part of it.
    below = sum(cell.best["time_hi_us"] < cell.rows["t_matmul_lo_us"].iloc[0] for cell in found)
    lines = [f"decoding, M ≤ {DECODE_ROWS}, with residual and RMSNorm: {span(over_base)} over sequential NCCL and "
             f"{span(over_peer)} over the fastest peer, at {len(found)} points"]  # fmt: skip
    if below:
        lines.append(f"at {below} of these {len(found)} the whole chain takes less time than cuBLAS's matmul alone, "
                     "by the intervals")  # fmt: skip
    return lines


def complete(cell: Cell) -> bool:
    return all(row is not None for row in (cell.base, cell.peer, cell.best))
