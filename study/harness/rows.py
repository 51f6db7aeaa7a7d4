"""Rows on their way to a stored table: out of the journal, over the launches, into CSV."""

import re
from collections.abc import Iterable
from typing import Any

import pandas as pd

from study.harness import stats
from study.harness.spec import Dataset

FLOAT_FORMAT = "%.6g"
# Six digits are stored, also of what a number is computed from, and CPUs and builds of NumPy differ in the last ones:
# numbers this near are equal.
TOLERANCE = 2e-5
TOLERANCES = {"eta": 2e-3}  # divided by the shorter side, which may be a hundredth of the longer
LAUNCH_COLUMNS = ["point_key", "repeat", "launch", "method_version"]
BOUND = re.compile(r"_(lo|hi)(?=_|$)")
# The least and greatest of as many launches cover the median of their distribution with 95 %.
MIN_LAUNCHES = 6


def aggregate(rows: pd.DataFrame, index: Iterable[str]) -> pd.DataFrame:
    """Reported rows from per-launch rows: median over launches, with an interval that says how far launches differ.

    Columns with `_lo` or `_hi` take the least or greatest value of few launches, which covers every launch's interval;
    from MIN_LAUNCHES on the rank-based interval of the launches' values, which does not grow with their number.
    `correct` is true where it is in every launch, a text takes its first non-empty value, a number of a row that is not
    correct is NaN; `num_launches` counts the launches.
    """
    by = ["point_key", *index]
    rules: dict[str, Any] = {}
    for column in rows.columns.difference([*by, *LAUNCH_COLUMNS, "num_launches"], sort=False):
        if rows[column].dtype == bool or column == "correct":
            rules[column] = "all"
        elif not pd.api.types.is_numeric_dtype(rows[column]):
            rules[column] = lambda values: next((value for value in values if pd.notna(value) and value != ""), "")
        elif bound := BOUND.search(column):
            rules[column] = {"lo": "min", "hi": "max"}[bound[1]]
        else:
            rules[column] = "median"
    groups = rows.groupby(by, sort=False, dropna=False)
    result = groups.agg(rules)
    for place, (_, launches) in enumerate(groups):
        if launches["launch"].nunique() >= MIN_LAUNCHES:
            for column, value in between_launches(launches).items():
                result.iloc[place, result.columns.get_loc(column)] = value
    for column in rules:  # a count or a size stays the whole number that it is
        if pd.api.types.is_integer_dtype(rows[column]) and (result[column] % 1 == 0).all():
            result[column] = result[column].astype("int64")
    if "correct" in result:  # what went wrong in one launch is not reported as timed by the others
        timed = [column for column in rules if pd.api.types.is_float_dtype(result[column])]
        result.loc[~result["correct"].astype(bool), timed] = float("nan")
    result["num_launches"] = groups["launch"].nunique()
    return result.reset_index()


def between_launches(launches: pd.DataFrame) -> dict[str, float]:
    """The bounds of one row's values by their spread over its launches, by column."""
    bounds = {}
    for column in launches.columns:
        bound = BOUND.search(column)
        value = BOUND.sub("", column)
        if bound and value in launches and launches[value].notna().all():
            _, low, high = stats.median_interval(launches[value])
            bounds[column] = low if bound[1] == "lo" else high
    return bounds


def agree(stored: pd.DataFrame, computed: pd.DataFrame) -> bool:
    """Whether both tables, as read from CSV, say the same: numbers as far as rounding their inputs lets them be known.

    A difference counts beside the value, and beside what it may be a difference of: 1 for a number without unit, the
    longest time of its row for a time.
    """
    if list(stored) != list(computed) or len(stored) != len(computed):
        return False
    times = [column for column in stored if column.endswith("_us")]
    longest = stored[times].abs().max(axis=1).fillna(0.0) if times else 0.0
    for column in stored:
        old, new = stored[column], computed[column]
        if not pd.api.types.is_numeric_dtype(old) or pd.api.types.is_bool_dtype(old):
            if not old.fillna("").astype(str).equals(new.fillna("").astype(str)):
                return False
            continue
        beside = old.abs().clip(lower=longest if column in times else 1.0)
        apart = (old - new).abs() > TOLERANCES.get(column, TOLERANCE) * beside
        if apart.any() or not old.isna().equals(new.isna()):
            return False
    return True


def as_csv(rows: pd.DataFrame) -> bytes:
    return rows.to_csv(index=False, float_format=FLOAT_FORMAT, lineterminator="\n").encode()


def replacing(old: pd.DataFrame, replaced: set[tuple[str, int]], new: pd.DataFrame) -> pd.DataFrame:
    """`old` without the (point key, repeat) pairs in `replaced`, then `new`."""
    pairs = pd.Series(list(zip(old["point_key"], old["repeat"], strict=True)), index=old.index, dtype=object)
    return pd.concat([frame for frame in (old[~pairs.isin(replaced)], new) if len(frame)], ignore_index=True)


def journal_frames(lines: list[dict[str, Any]], dataset: Dataset) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Per-launch rows and raw samples of journal lines; a later line for the same point and repeat counts."""
    latest = {(line["key"], line["repeat"]): line for line in lines}
    rows, samples = [], []
    for (key, repeat), line in latest.items():
        common = {"point_key": key, "repeat": repeat, "launch": line["launch"]}
        point = {name: value for name, value in line["point"].items() if name in dataset.schema.columns}
        rows += [
            {**common, "method_version": dataset.method_version, **point, "error": "", **row, "num_launches": 1}
            for row in line["rows"]
        ]
        for entry in line["samples"]:
            for rank, values in enumerate(entry["values"]):
                labels = {f"label_{name}": str(value) for name, value in entry["labels"].items()}
                samples.append(
                    pd.DataFrame(
                        {
                            **common,
                            **labels,
                            "quantity": entry["quantity"],
                            "rank": rank,
                            "iteration": range(len(values)),
                            "value": values,
                        }
                    )
                )
    return pd.DataFrame(rows), pd.concat(samples, ignore_index=True) if samples else pd.DataFrame()
