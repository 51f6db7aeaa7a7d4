"""Section 5: what it is meant to reach, judged over every point, with the points where it does not."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pandas as pd

from study.drawing.looks import label_at, look
from study.drawing.style import size_label
from study.published.criteria import (
    LINEAR_CHAIN_SPEEDUP,
    LINEAR_ERROR,
    LINEAR_FEW_ROWS,
    LINEAR_GROWTH_BYTES,
    LINEAR_MANY_ROWS,
    LINEAR_TARGETS,
    LINEAR_TOLERANCE,
    TARGET_LAUNCHES,
)
from study.report.linear import Cell, absent_peers, cells, summed_bytes
from study.report.report_tables import ABSENT, folded, table, us
from study.results.evidence import Evidence, Missing
from study.sections.linear_all_reduce.methods import CHAIN, MATMUL

MOST_EXCEPTIONS = 12


@dataclass(frozen=True)
class Criterion:
    """One promise over many points: `values` by point, `holds` says of a value whether it keeps the promise.

    unit: "×", "%" (of a fraction) or "B". notes: by point, what is told beside its value. without: peers that it
    was not compared with.
    """

    label: str
    wanted: str
    values: dict[str, float]
    holds: Callable[[float], bool]
    unit: str
    missing: tuple[str, ...] = ()
    least: bool = True  # the worst value is the least
    notes: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    def show(self, value: float) -> str:
        """With more digits than usual where the value, rounded, would be on the other side of the promise."""
        if self.unit == "B":
            return size_label(max(value, 0.0))
        digits, shift = (1, 2) if self.unit == "%" else (2, 0)
        while self.holds(round(value, digits + shift)) != self.holds(value):
            digits += 1
        return f"{value:.{digits}%}" if self.unit == "%" else f"{value:.{digits}f}{self.unit}"

    def row(self, launches: int) -> list[str]:
        if not self.values:
            return [self.label, self.wanted, ABSENT, "not measured"]
        kept = sum(map(self.holds, self.values.values()))
        worst = (min if self.least else max)(self.values, key=self.values.get)
        whole = kept == len(self.values) and not self.missing
        verdict = "**met**" if whole else f"**short**: kept at {kept} of {len(self.values) + len(self.missing)} points"
        few = f" ({launches} of {TARGET_LAUNCHES} launches)" if launches < TARGET_LAUNCHES else ""
        lacks = f"; without {', '.join(self.without)}, not measured" if self.without else ""
        return [self.label, self.wanted, f"worst {self.show(self.values[worst])} at {worst}", verdict + few + lacks]

    def exceptions(self) -> str:
        broken = sorted((name for name, value in self.values.items() if not self.holds(value)),
                        key=lambda name: self.values[name], reverse=not self.least)  # fmt: skip
        shown = [f"{name}: {self.show(self.values[name])}" + (f" ({self.notes[name]})" if name in self.notes else "")
                 for name in broken[:MOST_EXCEPTIONS]]  # fmt: skip
        shown += [f"{len(broken) - len(shown)} more"] if len(broken) > len(shown) else []
        return "; ".join([*shown, *(f"{name}: not measured" for name in self.missing)])


def ratios(found: Iterable[Cell], over_what: str, of_what: str) -> tuple[dict[str, float], tuple[str, ...]]:
    """Time of `over_what` over that of `of_what` by point, and the points that lack one of them."""
    values, missing = {}, []
    for cell in found:
        before, after = getattr(cell, over_what), getattr(cell, of_what)
        if before is None or after is None:
            missing.append(cell.name)
        else:
            values[cell.name] = before["time_us"] / after["time_us"]
    return values, tuple(missing)


def fractions(found: Iterable[Cell], of_what: str) -> tuple[dict[str, float], tuple[str, ...]]:
    rows = {cell.name: getattr(cell, of_what) for cell in found}
    present = {name: row["fraction_of_ideal"] for name, row in rows.items() if row is not None}
    return present, tuple(name for name, row in rows.items() if row is None)


def with_cublas(found: Iterable[Cell], wanted: float) -> dict[str, str]:
    """The speedup over sequential code by point, were all but cuBLAS's matmul free, and whether `wanted` is within it.

    A matmul of ours may take less time than that one: it is no bound of the chain's.
    """
    texts = {}
    for cell in found:
        if cell.base is not None:
            before, matmul = cell.base["time_us"], cell.rows["t_matmul_us"].iloc[0]
            reach = "with" if before / matmul >= wanted else "out of reach of"
            texts[cell.name] = f"{reach} cuBLAS's matmul alone: {us(before)} / {us(matmul)} = {before / matmul:.2f}×"
    return texts


def criteria(machine: Evidence) -> list[Criterion]:
    """Everything that is to be shown; raises Missing on a machine for which nothing was promised."""
    found = cells(machine, MATMUL)
    ranks = int(found[0].rows["tp"].iloc[0])
    if machine.kind != "cuda" or ranks not in LINEAR_TARGETS:
        raise Missing(f"targets are set for {' and '.join(map(str, LINEAR_TARGETS))} GPUs")
    wanted = LINEAR_TARGETS[ranks]
    many = [cell for cell in found if cell.m >= LINEAR_MANY_ROWS]
    few = [cell for cell in cells(machine, CHAIN) if cell.m <= LINEAR_FEW_ROWS]
    large, small = f"M ≥ {LINEAR_MANY_ROWS}", f"M ≤ {LINEAR_FEW_ROWS}"
    slower = 1 / (1 + LINEAR_TOLERANCE)

    absent = {operation: tuple(absent_peers(machine, operation)) for operation in (MATMUL, CHAIN)}

    def compare(label, wanted_text, compared, least, notes=(), without=()) -> Criterion:
        values, missing = compared
        return Criterion(label, wanted_text, values, lambda value: value >= least, "×", missing, notes=dict(notes),
                         without=without)  # fmt: skip

    def reach(label, compared) -> Criterion:
        values, missing = compared
        return Criterion(label, f"≥ {wanted:.0%}", values, lambda value: value >= wanted, "%", missing)

    return [
        reach(f"{large}: fraction of ideal, fastest of ours", fractions(many, "ours")),
        reach(f"{large}: fraction of ideal, planner", fractions(many, "planner")),
        compare(f"{large}: fastest peer over fastest of ours", "> 1", ratios(many, "peer", "ours"), 1.0,
                without=absent[MATMUL]),
        compare(f"{large}: fastest peer over planner", "> 1", ratios(many, "peer", "planner"), 1.0,
                without=absent[MATMUL]),
        compare(f"{small}, chain: sequential NCCL over planner", f"≥ {LINEAR_CHAIN_SPEEDUP}×",
                ratios(few, "base", "planner"), LINEAR_CHAIN_SPEEDUP, with_cublas(few, LINEAR_CHAIN_SPEEDUP)),
        compare(f"{small}, chain: fastest peer over planner", f"≥ {slower:.2f}×",
                ratios(few, "peer", "planner"), slower, without=absent[CHAIN]),
        compare("any M: fastest sequential arm over planner", f"≥ {slower:.2f}×",
                ratios(found, "sequential", "planner"), slower),
        errors(machine),
        *endurance(machine),
    ]  # fmt: skip


def errors(machine: Evidence) -> Criterion:
    """Relative error against float64 over that of plain code, of every method that is ours."""
    rows = machine.table("linear_all_reduce")
    rows = rows[~rows["is_peer"] & rows["correct"]]
    values = {
        f"{row['layer']}, M = {row['m']}, {label_at(row['method'], summed_bytes(row))}": row["relative_error"]
        / row["base_error"]
        for _, row in rows.iterrows()
    }
    return Criterion("relative error over that of cuBLAS + NCCL", f"≤ {LINEAR_ERROR}×", values,
                     lambda value: value <= LINEAR_ERROR, "×", least=False)  # fmt: skip


def endurance(machine: Evidence) -> list[Criterion]:
    try:
        rows = machine.table("linear_endurance")
    except Missing:
        columns = ["layer", "method", "num_repeats", "num_identical", "num_calls", "grown_bytes", "correct"]
        rows = pd.DataFrame(columns=columns)
    rows = rows.assign(name=[f"{row.layer}, {look(row.method).label}" for row in rows.itertuples()])
    correct = rows["correct"].astype(bool)
    failed, rows = tuple(rows.loc[~correct, "name"]), rows[correct]
    names = list(rows["name"])
    repeats, calls = rows["num_repeats"].max(), rows["num_calls"].max()
    same = dict(zip(names, rows["num_identical"] / rows["num_repeats"], strict=True))
    grown = dict(zip(names, rows["grown_bytes"].astype(float), strict=True))
    return [
        Criterion(f"{repeats} repeats, bitwise the same" if names else "repeats, bitwise the same", "all", same,
                  lambda value: value == 1, "%", failed),
        Criterion(f"{calls} calls of changing shapes: memory grows by" if names else "calls of changing shapes",
                  f"< {size_label(LINEAR_GROWTH_BYTES)}", grown, lambda value: value < LINEAR_GROWTH_BYTES, "B",
                  failed, least=False),
    ]  # fmt: skip


def targets(machine: Evidence) -> str:
    """Each promise with the worst point and whether it is kept; below it every point where it is not."""
    rows = machine.table("linear_all_reduce")
    promised = criteria(machine)
    launches = int(rows["num_launches"].min())
    # Repeats and calls are of one process by themselves.
    body = [one.row(launches if "repeats" not in one.label and "calls" not in one.label else TARGET_LAUNCHES)
            for one in promised]  # fmt: skip
    text = table(body, ["promise", "wanted", "measured", ""])
    broken = [f"- {one.label}: {one.exceptions()}" for one in promised if one.values and one.exceptions()]
    listed = folded("The points where a promise is not kept", "\n".join(broken))
    return text + (f"\n\nEvery exception:\n\n{listed}" if broken else "")
