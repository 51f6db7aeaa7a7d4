"""Rows on their way to a stored table: out of the journal, over the launches, into CSV."""

import re
from collections.abc import Iterable
from typing import Any

import pandas as pd

from maco_lib.study.spec import Dataset

FLOAT_FORMAT = "%.6g"
LAUNCH_COLUMNS = ["point_key", "repeat", "launch", "method_version"]


def aggregate(rows: pd.DataFrame, index: Iterable[str]) -> pd.DataFrame:
    """Reported rows from per-launch rows: median over launches, intervals widened to cover every launch's interval.

    Columns with `_lo` or `_hi` take the least or greatest value, `correct` is true where it is in every launch, a text
    takes its first non-empty value, a number of a row that is not correct is NaN; `num_launches` counts the launches.
    """
    by = ["point_key", *index]
    rules: dict[str, Any] = {}
    for column in rows.columns.difference([*by, *LAUNCH_COLUMNS, "num_launches"], sort=False):
        if rows[column].dtype == bool or column == "correct":
            rules[column] = "all"
        elif not pd.api.types.is_numeric_dtype(rows[column]):
            rules[column] = lambda values: next((value for value in values if pd.notna(value) and value != ""), "")
        elif re.search(r"_lo(_|$)", column):
            rules[column] = "min"
        elif re.search(r"_hi(_|$)", column):
            rules[column] = "max"
        else:
            rules[column] = "median"
    groups = rows.groupby(by, sort=False, dropna=False)
    result = groups.agg(rules)
    for column in rules:  # a count or a size stays the whole number that it is
        if pd.api.types.is_integer_dtype(rows[column]) and (result[column] % 1 == 0).all():
            result[column] = result[column].astype("int64")
    if "correct" in result:  # what went wrong in one launch is not reported as timed by the others
        timed = [column for column in rules if pd.api.types.is_float_dtype(result[column])]
        result.loc[~result["correct"].astype(bool), timed] = float("nan")
    result["num_launches"] = groups["launch"].nunique()
    return result.reset_index()


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
