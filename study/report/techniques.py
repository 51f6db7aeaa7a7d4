"""Section 1's techniques in the published configurations: the fastest, the planner's choice, and what they reach."""

import math
import pathlib
from collections.abc import Iterable, Sequence

import pandas as pd

from study.drawing.looks import label_at, look
from study.drawing.style import digits, size_label
from study.harness.markdown import verbatim
from study.published import tables as published
from study.published.criteria import LARGE_BYTES, LEAST_IDEAL_GAIN, SMALL_BYTES, TARGET_LAUNCHES, TARGETS, Target
from study.report import sharing
from study.report.report_tables import ABSENT, interval, table, us
from study.results.evidence import Evidence, Missing

PLANNER = "auto"
NOT_MEASURED = "not measured"
NOTABLE = 1.02  # a ratio worth a word


def configurations(evidence: Evidence, root: pathlib.Path) -> dict[str, pd.DataFrame]:
    """Finished rows of each published configuration in the device protocol, by method, in the printed order.

    Only configurations with an overlapped technique; raises Missing when there is none.
    """
    rows = evidence.table("overlap")
    rows = rows[rows["protocol"].eq("device")].dropna(subset=["t_overlap_us", "ideal_us"])
    groups = {
        name: rows[rows["configuration"] == name].set_index("method", drop=False)
        for name in published.numbers(root, "overlap")["configuration"]
    }
    found = {name: group for name, group in groups.items() if fastest(group) is not None}
    if not found:
        raise Missing("no published configuration has a finished overlapped technique in the device protocol")
    return found


def fastest(group: pd.DataFrame) -> pd.Series | None:
    """The row of the fastest overlapped technique; the planner's is a choice among them and does not count."""
    rows = overlapped(group)
    return None if rows.empty else rows.loc[rows["t_overlap_us"].idxmin()]


def overlapped(group: pd.DataFrame) -> pd.DataFrame:
    """The rows of the techniques: not sequential, not the planner."""
    return group[~group["method"].str.startswith("sequential") & group["method"].ne(PLANNER)]


def planned(group: pd.DataFrame) -> pd.Series | None:
    return group.loc[PLANNER] if PLANNER in group.index else None


def fraction(row: pd.Series) -> tuple[float, float, float]:
    """Fraction of the ideal with the interval of the overlapped time: (value, low, high)."""
    value, low, high = (row["ideal_us"] / row[f"t_overlap_{end}us"] for end in ("", "hi_", "lo_"))
    return value, low, high


def percent(row: pd.Series) -> str:
    """ "96.2% [95.8, 96.5]"."""
    value, low, high = (100 * part for part in fraction(row))
    return f"{value:.1f}% [{low:.1f}, {high:.1f}]"


def gain_fraction(row: pd.Series) -> tuple[float, float, float]:
    """(T_seq − T_overlap) / (T_seq − ideal), the fraction of the ideal gain: (value, low, high), by the speedup's ends.

    NaN where T_seq / ideal is below LEAST_IDEAL_GAIN: the noise of T_seq would decide it.
    """
    before, ideal = row["t_seq_us"], row["ideal_us"]
    if before / ideal < LEAST_IDEAL_GAIN:
        return math.nan, math.nan, math.nan
    times = row["t_overlap_us"], before / row["speedup_lo"], before / row["speedup_hi"]
    value, low, high = ((before - time) / (before - ideal) for time in times)
    return value, low, high


def gain_percent(row: pd.Series) -> str:
    """ "89.6% [89.1, 90.2]", or "–" where there is next to nothing to gain."""
    value, low, high = (100 * part for part in gain_fraction(row))
    return ABSENT if math.isnan(value) else f"{value:.1f}% [{low:.1f}, {high:.1f}]"


def plan_of(row: pd.Series) -> str:
    """What the planner chose, in the words of its row."""
    return row.get("plan") or look(row["backend"]).label


def factor(value: float) -> str:
    return f"{value:.2f}×" if pd.notna(value) else ABSENT


def two_streams(machines: Sequence[Evidence], root: pathlib.Path, protocol: str) -> str:
    """The published technique against sequential in one protocol: a row per published configuration and machine.

    In the device protocol with the fractions of the ideal and of its gain; in the other the host takes part.
    """
    device = protocol == "device"
    body = []
    for printed in published.printed(root, "overlap").itertuples():
        if not device:
            said = f"{printed.sequential} → {printed.overlapped}, {printed.speedup}"
            body.append([printed.configuration, "published", said])
        for machine in machines:
            try:
                rows = machine.table("overlap")
            except Missing:
                continue
            rows = rows[rows["configuration"].eq(printed.configuration) & rows["protocol"].eq(protocol)]
            for _, row in rows[rows["method"] == "two_stream"].iterrows():
                body.append([printed.configuration, verbatim(machine.name), *one_two_stream(row)[: 3 if device else 1]])
    return table(body, ["configuration", "machine", "sequential → two streams, speedup",
                        *(["of the ideal", "of the ideal gain"] if device else [])])  # fmt: skip


def one_two_stream(row: pd.Series) -> list[str]:
    """Times and speedup, fraction of the ideal and of its gain; or why there are none."""
    if pd.isna(row["t_overlap_us"]):
        return [f"failed: {verbatim(row['error'])}", ABSENT, ABSENT]
    times = f"{us(row['t_seq_us'])} → {interval(row, 't_overlap', 'us', us)}"
    speedup = f"**{row['speedup']:.2f}×** [{row['speedup_lo']:.2f}, {row['speedup_hi']:.2f}]"
    return [f"{times}, {speedup}", f"{percent(row)} of {us(row['ideal_us'])}", gain_percent(row)]


def comparison(machine: Evidence, root: pathlib.Path) -> str:
    """Per published configuration the fastest technique and the planner's choice: times, split speedup, fraction."""
    body = []
    for name, group in configurations(machine, root).items():
        for who, row in (("fastest", fastest(group)), ("planner", planned(group))):
            if row is None:
                body.append([name, f"{who}: {NOT_MEASURED}", *[ABSENT] * 4])
                continue
            what = look(row["method"]).label if who == "fastest" else f"`{plan_of(row)}`"
            speedup = f"**{factor(row['speedup'])}** [{row['speedup_lo']:.2f}, {row['speedup_hi']:.2f}]"
            split = f"{factor(row['speedup_collective'])} · {factor(row['speedup_overlap'])}"
            body.append([name, f"{who}: {what}", f"{us(row['t_seq_us'])} → {interval(row, 't_overlap', 'us', us)}",
                         f"{speedup} = {split}", f"{percent(row)} of {us(row['ideal_us'])}",
                         gain_percent(row)])  # fmt: skip
    headers = ["configuration", "technique", "sequential → overlapped", "speedup = faster collective · overlap",
               "of the ideal", "of the ideal gain"]  # fmt: skip
    return table(body, headers)


def mean_speedup(rows: Iterable[pd.Series]) -> tuple[float, float, float]:
    """The arithmetic mean, as the published average, with the mean of the ends of the intervals."""
    rows = list(rows)
    value, low, high = (sum(row[f"speedup{end}"] for row in rows) / len(rows) for end in ("", "_lo", "_hi"))
    return value, low, high


def geometric(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def means(machine: Evidence, root: pathlib.Path) -> list[str]:
    """The mean speedup over the sequential default collective, of the fastest technique and of the planner."""
    groups = configurations(machine, root)
    lines = []
    for who, choose in (("the fastest technique", fastest), ("the planner", planned)):
        rows = [row for row in map(choose, groups.values()) if row is not None]
        if not rows:
            lines.append(f"{who}: {NOT_MEASURED} on {verbatim(machine.name)}")
            continue
        value, low, high = mean_speedup(rows)
        whole, *parts = (geometric(row[name] for row in rows) for name in
                         ("speedup", "speedup_collective", "speedup_overlap"))  # fmt: skip
        lines.append(
            f"{who}: **{value:.2f}×** [{low:.2f}, {high:.2f}] on average over {len(rows)} configurations (arithmetic, "
            f"as published); the geometric mean {whole:.2f}× is {factor(parts[0])} from the collective itself · "
            f"{factor(parts[1])} from overlapping it"
        )
    return lines


def what_holds_back(evidence: Evidence, group: pd.DataFrame) -> list[str]:
    """Why the fastest technique of a configuration stays below the ideal there.

    The shortfall in two factors, its longer side alone over the ideal and its time over that side; then how much each
    side slows, and what SMs cost the matmul.
    """
    row, reasons = fastest(group), []
    alone = max(row["t_comm_us"], row["t_comp_us"])
    if alone / row["ideal_us"] >= NOTABLE:
        reasons.append(f"its all-reduce alone takes {us(alone)}, {alone / row['ideal_us']:.2f}× the ideal")
        quickest = overlapped(group).loc[overlapped(group)["t_comm_us"].idxmin()]
        if quickest["t_comm_us"] < NOTABLE * row["t_comm_best_us"] and quickest["backend"] != row["backend"]:
            reasons[-1] += (
                f" ({look(quickest['backend']).label}, the fastest by itself, needs {us(quickest['t_overlap_us'])} "
                "with the matmul)"
            )
    side = "all-reduce" if row["t_comm_us"] >= row["t_comp_us"] else "matmul"
    reasons.append(f"overlapped, the {us(alone)} of its {side} become {us(row['t_overlap_us'])}, "
                   f"{row['t_overlap_us'] / alone:.2f}×")  # fmt: skip
    if pd.notna(row["sigma_comm"]) and pd.notna(row["sigma_comp"]):
        reasons.append(f"as long as both run the all-reduce takes {row['sigma_comm']:.2f}× and the matmul "
                       f"{row['sigma_comp']:.2f}× its time alone")  # fmt: skip
    if row["t_comp_us"] >= row["t_comm_best_us"]:
        try:
            reasons.append(f"{sharing.whole_waves(evidence, row['matmul_n'])} (figure `overlap_sm_sharing`)")
        except Missing as missing:
            reasons.append(f"what SMs cost that matmul is not known: {missing}")
    return [f"why not in “{row['configuration']}”: {'; '.join(reasons)}"] if reasons else []


# -- what is to be reached ----------------------------------------


def targets_of(machine: Evidence) -> Target:
    """The targets for this machine; raises Missing where none are set."""
    ranks = int(machine.table("overlap")["num_ranks"].iloc[0])
    if machine.kind != "cuda" or ranks not in TARGETS:
        where = f"{ranks} ranks on a CPU" if machine.kind != "cuda" else f"{ranks} GPUs"
        raise Missing(f"targets are set for {' and '.join(map(str, TARGETS))} GPUs, not for {where}")
    return TARGETS[ranks]


def judged(value: float, holds: bool, launches: int) -> str:
    """The verdict of one target; what was shown in too few launches says so."""
    if pd.isna(value):
        return NOT_MEASURED
    verdict = "met" if holds else "not met"
    return f"**{verdict}**" + (f" ({launches} of {TARGET_LAUNCHES} launches)" if launches < TARGET_LAUNCHES else "")


def targets(machine: Evidence, root: pathlib.Path) -> str:
    """Each target with what was measured and whether that meets it, for the fastest technique and the planner."""
    wanted = targets_of(machine)
    body = []
    groups = configurations(machine, root)
    printed = published.numbers(root, "overlap")["configuration"]
    chosen = {"fastest": fastest, "planner": planned}
    rows: dict[str, list[pd.Series]] = {who: [] for who in chosen}
    for name in printed:
        cells = []
        for who, choose in chosen.items():
            row = choose(groups[name]) if name in groups else None
            if row is None or not row["published_size"]:
                cells += [ABSENT, NOT_MEASURED]
                continue
            rows[who].append(row)
            value = fraction(row)[0]
            cells += [percent(row), judged(value, value >= wanted.fraction_of_ideal, row["num_launches"])]
        body.append([f"fraction of ideal, {name}", f"≥ {wanted.fraction_of_ideal:.0%}", *cells])
    cells = []
    for mine in rows.values():
        if len(mine) < len(printed):
            cells += [f"{len(mine)} of {len(printed)} configurations", NOT_MEASURED]
            continue
        value, low, high = mean_speedup(mine)
        launches = min(row["num_launches"] for row in mine)
        cells += [f"{value:.2f}× [{low:.2f}, {high:.2f}]", judged(value, value >= wanted.mean_speedup, launches)]
    body.append(["mean speedup over sequential NCCL", f"≥ {wanted.mean_speedup:.2f}×", *cells])
    body += [
        bandwidth_target(machine, LARGE_BYTES, "busbw", f"≥ {wanted.busbw_gb_per_s:.0f} GB/s",
                         lambda row: row["busbw_gb_per_s"] >= wanted.busbw_gb_per_s),
        bandwidth_target(machine, SMALL_BYTES, "time", f"≤ {us(wanted.latency_us)}",
                         lambda row: row["time_us"] <= wanted.latency_us),
    ]  # fmt: skip
    return table(body, ["target", "wanted", "fastest technique", "", "planner", ""])


def bandwidth_target(machine: Evidence, size: int, quantity: str, wanted: str, holds) -> list[str]:
    """The row of a target of the all-reduce alone: its fastest backend at `size` bytes."""
    label = f"all-reduce of {size_label(size)}, {quantity}"
    try:
        rows = machine.table("bandwidth")
    except Missing as missing:
        return [label, wanted, str(missing), NOT_MEASURED, ABSENT, ""]
    rows = rows[rows["collective"].eq("all_reduce") & published.same_size(rows["bytes"], size)]
    rows = rows.dropna(subset=["time_us"])
    if rows.empty:
        return [label, wanted, ABSENT, NOT_MEASURED, ABSENT, ""]
    row = rows.loc[rows["time_us"].idxmin()]
    shown = interval(row, "time", "us", us)
    if quantity == "busbw":
        ends = (row["busbw_gb_per_s"] * row["time_us"] / row[f"time_{end}_us"] for end in ("hi", "lo"))
        shown = f"{digits(row['busbw_gb_per_s'])} [{', '.join(map(digits, ends))}] GB/s"
    verdict = judged(row["time_us"], holds(row), row["num_launches"])
    return [label, wanted, f"{shown}, {label_at(row['backend'], size)}", verdict, ABSENT, ""]
