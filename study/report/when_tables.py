"""Section 4's tables: every technique's fit and what it predicts, real models, and a fit on another machine."""

from collections.abc import Sequence

import pandas as pd

from study.drawing.looks import look, ordered
from study.drawing.style import size_label
from study.harness.markdown import verbatim
from study.report import transfer
from study.report.report_tables import ABSENT, table
from study.results.evidence import Evidence
from study.sections.when_to_overlap.section import NUM_PARAMETERS, testable

NOT_TESTABLE = "not testable"


def prediction(machine: Evidence) -> str:
    """Per technique the fitted stretch, to how many points, and the error of the prediction on those held out."""
    rows = machine.table("when_to_overlap")
    groups = {method: rows[rows["method"] == method] for method in ordered(rows["method"])}
    num_points = {method: int(group["num_training"].iloc[0]) for method, group in groups.items()}
    body = []
    for method in sorted(groups, key=lambda name: not testable(num_points[name])):
        group, first = groups[method], groups[method].iloc[0]
        counts = group["measured_verdict"].value_counts()
        stretch = f"{first['sigma_comm']:.2f}, {first['sigma_comp']:.2f}, {first['delta_us']:.2f} µs"
        body.append([look(method).label, str(num_points[method]), str(num_points[method] - NUM_PARAMETERS), stretch,
                     *held_out(group, testable(num_points[method])),
                     *(str(counts.get(name, 0)) for name in ("helps", "hurts", "undecided"))])  # fmt: skip
    headers = ["method", "fitted to, points", "degrees of freedom", "σ_comm, σ_comp, δ",
               "error held out: median (worst)", "verdicts predicted, of those held out", "helps", "hurts",
               "undecided"]  # fmt: skip
    text = table(body, headers)
    if not all(map(testable, num_points.values())):
        text += (
            f"\n\n{NUM_PARAMETERS} parameters meet {NUM_PARAMETERS} points whatever these are. Where no degree of "
            "freedom is left, the fit describes its points and does not test the model: neither the deviation of the "
            "one or few points held out nor the interval of a prediction estimates its error."
        )
    return text


def held_out(group: pd.DataFrame, can_miss: bool) -> tuple[str, str]:
    """Error and verdicts of one technique's points held out; `can_miss`: its fit had degrees of freedom left."""
    rows = group[group["held_out"]]
    errors = rows["error"].abs()
    if rows.empty:
        return ABSENT, ABSENT
    if not can_miss:
        return f"no estimate; off by {', '.join(f'{error:.1%}' for error in errors)}", NOT_TESTABLE
    right = (rows["verdict"] == rows["measured_verdict"]).sum()
    return f"{errors.median():.1%} ({errors.max():.1%}) of {len(errors)}", f"{right} of {len(errors)}"


def models(machine: Evidence) -> str:
    """Communication share and gain per model, at the ends of the decode and prefill ranges."""
    rows = machine.table("model_shares")
    body = []
    for (model, tp, phase), group in rows.groupby(["model", "tp", "phase"], sort=False):
        for _, row in group.sort_values("tokens").iloc[[0, -1]].iterrows():
            what = f"batch {row['batch']}" if phase == "decode" else f"{row['tokens']} tokens"
            body.append([model, str(tp), f"{phase}, {what}", f"{row['comm_share']:.0%}", f"{row['ideal_gain']:.2f}×",
                         f"{row['gain']:.2f}× [{row['gain_lo']:.2f}, {row['gain_hi']:.2f}]", row["verdict"],
                         "yes" if row["extrapolated"] else "no"])  # fmt: skip
    predicted = f"predicted gain, {look(rows['method'].iloc[0]).label}"
    return table(body, ["model", "TP", "work", "communication", "ideal gain", predicted, "verdict", "extrapolated"])


def seen(machine: Evidence) -> str:
    """The sizes of the all-reduces that the fit behind the models' table has seen overlapped."""
    method = machine.table("model_shares")["method"].iloc[0]
    rows = machine.table("when_to_overlap")
    sizes = rows.loc[(rows["method"] == method) & ~rows["held_out"], "comm_bytes"]
    ends = f"{size_label(sizes.min())} to {size_label(sizes.max())}"
    return (
        "Extrapolated: no all-reduce of so many ranks, or none as small or as large, was measured by itself. "
        f"The fit of {look(method).label} has seen all-reduces of {ends} beside a matmul; for smaller and larger ones, "
        "as in much of decoding, there is the model's word only."
    )


def transfers(machines: Sequence[Evidence]) -> str:
    """The model fitted on one machine judged on each other of its kind, and a line for a machine without another.

    Only fits that can be wrong are carried over; a row per technique and judged machine, a column per fit.
    """
    pairs = transfer.pairs(machines)
    found = [one for source, target in pairs for one in transfer.judge(source, target)]
    found = [one for one in found if testable(one.num_training)]
    sources = list(dict.fromkeys(one.fitted_on for one in found))
    by = {(one.judged_on, one.method, one.fitted_on): one for one in found}
    rows = []
    for judged_on, method in dict.fromkeys((one.judged_on, one.method) for one in found):
        mine = {source: by.get((judged_on, method, source)) for source in sources}
        first = next(one for one in mine.values() if one)
        own = ABSENT if pd.isna(first.own_error) else f"{first.own_error:.1%}"
        cells = [ABSENT if one is None else f"{one.median_error:.1%} ({one.worst_error:.0%}), {one.num_right}"
                 for one in mine.values()]  # fmt: skip
        rows.append([verbatim(judged_on), look(method).label, str(first.num_points), own, *cells])
    parts = []
    if rows:
        fits = (f"fitted on {verbatim(name)}" for name in sources)
        headers = ["judged on", "method", "points", "own fit, held out", *fits]
        parts += ["Median error (worst), and at how many points the verdict is predicted:", table(rows, headers)]
    elif pairs:
        parts.append("No technique of theirs was measured at enough points for its fit to be carried over.")
    for machine in transfer.alone(machines):
        parts.append(f"{verbatim(machine.name)} is the only machine of its kind ({machine.kind}) with this section "
                     "measured, so its model is not judged on another one.")  # fmt: skip
    return "\n\n".join(parts)
