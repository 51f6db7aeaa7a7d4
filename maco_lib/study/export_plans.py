"""`python -m maco_lib export-plans`: the tables of plans that the library ships, from section 5's stored tables.

A machine's folder becomes `maco_lib/overlap/tables/<gpu>-x<ranks>.json` if it is named so: a second machine of the same
hardware has a name of its own, and stays out.
"""

import argparse
import json
import re

import pandas as pd

from maco_lib.experiments.linear_all_reduce_methods import BASE, MATMUL, METHODS
from maco_lib.overlap.linear_plan import LinearPlan
from maco_lib.overlap.linear_tables import FOLDER
from maco_lib.overlap.linear_techniques.persistent_time import TILINGS, ascii_tiling
from maco_lib.overlap.plan import MARGIN
from maco_lib.study.files import write_atomically
from maco_lib.study.store import Store

TABLE = "linear_all_reduce"
# Backends of other packages, which a user may not have: beside them the fastest without.
OF_OTHERS = ("vllm_custom",)


def plan_of(row: pd.Series) -> LinearPlan | None:
    """What a finished row ran, as a plan; None where it was no plan of `linear_all_reduce`, or is none any more."""
    method = METHODS[MATMUL][row["method"]]
    if method.how == "in_place":
        return LinearPlan(backend=method.backend)
    if method.how not in ("plan", "auto") or not (method.plan or row["plan"]):
        return None
    plan = LinearPlan(**method.plan) if method.how == "plan" else LinearPlan.parse(row["plan"])
    # Tables from before plans had tilings say beside the plan which one was taken.
    taken = ascii_tiling(row["tiling"])
    return LinearPlan(plan.technique, tiling=taken) if taken in map(str, TILINGS) else plan


def kept(times_us: dict[LinearPlan, float], default_us: float) -> dict[str, float]:
    """By name, those that beat the default, sequential NCCL: the fastest of each technique, and without `OF_OTHERS`."""
    by_time = sorted(times_us, key=lambda plan: (times_us[plan], plan.name))
    everywhere = [plan for plan in by_time if plan.backend not in OF_OTHERS]
    firsts = {
        plan for plans in (by_time, everywhere) for plan in {each.technique: each for each in plans[::-1]}.values()
    }
    chosen = [plan for plan in by_time if plan in firsts and times_us[plan] < (1 - MARGIN) * default_us]
    return {plan.name: times_us[plan] for plan in chosen}


def points(rows: pd.DataFrame) -> list[dict]:
    """A point for each layer and M of a stored table."""
    rows = rows[rows["operation"].eq(MATMUL) & rows["time_us"].notna()]
    found = []
    for (m, n, k, tp), group in rows.groupby(["m", "n", "k", "tp"]):
        default_us = float(group.loc[group["method"].eq(BASE["cuda"]), "time_us"].iloc[0])
        times_us: dict[LinearPlan, float] = {}
        for _, row in group.iterrows():
            if (plan := plan_of(row)) is not None:
                times_us[plan] = min(times_us.get(plan, row["time_us"]), row["time_us"])
        shape = {"m": int(m), "n": int(n), "k": int(k // tp)}
        found.append({**shape, "nccl_us": default_us, "plans": kept(times_us, default_us)})
    return found


def as_text(content: dict) -> str:
    """JSON with a line for each point."""
    head = {name: value for name, value in content.items() if name != "points"}
    lines = ",\n".join(f"  {json.dumps(point)}" for point in content["points"])
    return f'{json.dumps(head, indent=1)[:-2]},\n "points": [\n{lines}\n ]\n}}\n'


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
            "source": f"data/{name}/{TABLE}.csv",
            "sha256": store.checksum(name, TABLE),
            "commits": sorted({facts["git"]["commit"][:7] for facts in launches}),
            "torch": sorted({facts["versions"]["torch"] for facts in launches}),
            "points": points(store.read(name, TABLE)),
        }
        texts[f"{name}.json"] = as_text(content)
    return texts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(main=main)


def main(options: argparse.Namespace) -> int:
    for name, text in exported(Store()).items():
        write_atomically(FOLDER / name, text.encode())
        print(f"{FOLDER / name}: {text.count('nccl_us')} points")
    return 0
