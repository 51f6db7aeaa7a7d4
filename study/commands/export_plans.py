"""`python -m study export-plans`: the tables of plans that the library ships, from section 5's stored tables.

A machine's folder becomes `maco_lib/linear/tables/<gpu>-x<ranks>.json` if it is named so: a second machine of the same
hardware has a name of its own, and stays out.
"""

import argparse
import json
import re
from dataclasses import replace

import pandas as pd

from maco_lib.linear.lookup import FOLDER
from maco_lib.linear.plan import LinearPlan
from study.harness.files import write_atomically
from study.results.store import Store
from study.sections.linear_all_reduce.methods import MATMUL, METHODS

TABLE = "linear_all_reduce"
DEFAULT = "sequential:nccl"


def plan_of(row: pd.Series) -> LinearPlan | None:
    """What a finished row ran, as a plan; None where it was no plan of `linear_all_reduce`, or is none any more."""
    method = METHODS[MATMUL][row["method"]]
    if method.how == "in_place":
        return LinearPlan(backend=method.backend)
    if method.how == "plan":
        return LinearPlan(**method.plan)
    return LinearPlan.parse(row["plan"]) if method.how == "auto" and row["plan"] else None


def layers(rows: pd.DataFrame) -> list[dict]:
    """The layers of a stored table, with the times of each plan by M; of the persistent kernel the fastest tiling's."""
    rows = rows[rows["operation"].eq(MATMUL) & rows["time_us"].notna()]
    found = []
    for (n, k, tp), group in rows.groupby(["n", "k", "tp"]):
        times_us: dict[str, dict[int, float]] = {}
        for _, row in group.sort_values("m", kind="stable").iterrows():
            if (plan := plan_of(row)) is not None:
                by_rows = times_us.setdefault(replace(plan, tiling="").name, {})
                by_rows[row["m"]] = min(by_rows.get(row["m"], row["time_us"]), row["time_us"])
        found.append({"n": int(n), "k": int(k // tp), "times_us": dict(sorted(times_us.items()))})
    return found


def as_text(content: dict) -> str:
    """JSON with a line for each plan of a layer."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\{[^{}]*\}", lambda found: " ".join(found[0].split()), text) + "\n"


def exported(store: Store) -> dict[str, str]:
    """The shipped tables' texts by file name."""
    texts = {}
    for name in store.machines():
        shape = re.fullmatch(r"(.+)-x(\d+)", name)
        if not shape or not (store.data / name / f"{TABLE}.csv").exists():
            continue
        record = store.record(name, TABLE)
        launches = [facts for facts in record["launches"].values() if facts.get("table") == TABLE]
        content = {
            "gpu": shape[1],
            "num_ranks": int(shape[2]),
            "default": DEFAULT,
            "source": f"data/{name}/{TABLE}.csv",
            "sha256": store.checksum(name, TABLE),
            "commits": sorted({facts["git"]["commit"][:7] for facts in launches}),
            "torch": sorted({facts["versions"]["torch"] for facts in launches}),
            "layers": layers(store.read(name, TABLE)),
        }
        texts[f"{name}.json"] = as_text(content)
    return texts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(main=main)


def main(options: argparse.Namespace) -> int:
    for name, text in exported(Store()).items():
        write_atomically(FOLDER / name, text.encode())
        print(f"{FOLDER / name}: {text.count('times_us')} layers")
    return 0
