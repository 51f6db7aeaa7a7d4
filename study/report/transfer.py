"""The overlap model fitted on one machine, judged on the points that another machine of the same kind measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from study.harness.stats import verdict
from study.results.evidence import Evidence
from study.sections.when_to_overlap.model import Stretch


@dataclass(frozen=True)
class Transfer:
    """Errors |predicted / measured − 1| of one technique; `own_error` is that of the judged machine's own held-out
    points (NaN when it has none); `num_training` points made the fit."""

    fitted_on: str
    judged_on: str
    method: str
    num_training: int
    num_points: int
    median_error: float
    worst_error: float
    num_right: int
    own_error: float


def pairs(machines: Sequence[Evidence]) -> list[tuple[Evidence, Evidence]]:
    """Every ordered pair of machines of one kind that both have the table `when_to_overlap`."""
    able = [machine for machine in machines if "when_to_overlap" in machine.tables]
    return [(one, other) for one in able for other in able if one is not other and one.kind == other.kind]


def judge(fitted_on: Evidence, judged_on: Evidence) -> list[Transfer]:
    """One `Transfer` per technique that both machines fitted; T_comm and T_comp alone are the judged machine's."""
    source, target = fitted_on.tables["when_to_overlap"], judged_on.tables["when_to_overlap"]
    result = []
    for method, rows in target.groupby("method", sort=False):
        fit = source[source["method"] == method]
        if fit.empty:
            continue
        first = fit.iloc[0]
        stretch = Stretch(first["sigma_comm"], first["sigma_comp"], first["delta_us"], first["spread"])
        alone_us = rows["t_comm_us"], rows["t_comp_us"]
        error = (stretch.predict(*alone_us) / rows["measured_us"] - 1).abs()
        low, high = stretch.interval(*alone_us)
        said = [verdict(*ends) for ends in zip(rows["t_seq_us"] / high, rows["t_seq_us"] / low, strict=True)]
        own = rows.loc[rows["held_out"], "error"].abs().median()
        num_right = int((rows["measured_verdict"] == said).sum())
        result.append(Transfer(fitted_on.name, judged_on.name, method, int(first["num_training"]), len(rows),
                               error.median(), error.max(), num_right, own))  # fmt: skip
    return result


def alone(machines: Sequence[Evidence]) -> list[Evidence]:
    """The machines whose fit no other machine's points can judge."""
    paired = {one.name for one, _ in pairs(machines)}
    return [machine for machine in machines if machine.name not in paired]
