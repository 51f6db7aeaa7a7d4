"""Whether overlapping pays for given shapes, from what a machine measured: `python -m study advise`.

python -m study advise --m 4096 --n 5120 --k 25600 --tp 2          a row-parallel matmul and its all-reduce
python -m study advise --model Qwen3-32B --tokens 4096 --tp 2      a layer of a model
"""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line imports this module for every command; pandas is loaded when advice is asked for
    import pandas as pd

    from study.results.store import Store

TABLES = ("when_to_overlap", "bandwidth", "environment")
NOTE = (
    "Gains are over the default all-reduce, then the matmul. An interval is as good as the shapes it is fitted on.\n"
    "The gain counts on other work to run beside the all-reduce: another micro-batch, or the same matmul in chunks.\n"
    "Attention, norms and activations are left out, so the true share of communication is smaller."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--m", type=int, help="tokens: rows of the activations")
    parser.add_argument("--n", type=int, help="output features of the matmul: columns of the all-reduced tensor")
    parser.add_argument("--k", type=int, help="input features of the whole matmul; each rank has k / tp")
    parser.add_argument("--model", help="instead of m, n, k: a layer of this model, for example Qwen3-32B")
    parser.add_argument("--tokens", type=int, help="with --model: tokens in one forward pass")
    parser.add_argument("--tp", type=int, required=True, help="tensor-parallel size: ranks of the all-reduce")
    parser.add_argument("--dtype", default="bf16", help="bf16, fp16 or fp32 (default: %(default)s)")
    parser.add_argument(
        "--machine", default="auto", help="folder in data/ whose measurements count (default: this host's)"
    )


def main(options: argparse.Namespace) -> int:
    """Print the advice; returns the exit status. Raises ValueError naming a wrong value and the valid ones."""
    from study.commands import advise_linear
    from study.results.store import Store

    check(options)
    store = Store()
    folder = machine_folder(store, options.machine)
    tables = {name: store.read(folder, name) for name in TABLES}
    if options.model:
        rows = advise(tables, options.tp, options.dtype, model_name=options.model, tokens=options.tokens)
        what = f"one layer of {options.model}, {options.tokens} tokens"
        shapes = advise_linear.row_parallel(options.model, options.tokens)
    else:
        rows = advise(tables, options.tp, options.dtype, shape=(options.m, options.n, options.k))
        what = f"({options.m}, {options.k}) @ ({options.k}, {options.n}) and its all-reduce"
        shapes = {"": (options.m, options.n, options.k)}
    print(f"{what}, tp {options.tp}, {options.dtype}, by the measurements of {folder}\n")
    print(as_text(rows))
    left_out = sorted(set(tables["when_to_overlap"]["method"]) - set(rows["method"]))
    if left_out:
        print(f"\nNot judged, as {folder} has no all-reduce of theirs by itself: {', '.join(left_out)}")
    print(f"\n{NOTE}")
    print(f"\n{usage(rows)}")
    if rows["extrapolated"].any():
        print(f"Extrapolated: {folder} measured no all-reduce of that many ranks, or none as small, or none as large.")
    measured = (store.data / folder / f"{advise_linear.TABLE}.csv").exists()
    linear = store.read(folder, advise_linear.TABLE) if measured else None
    print(f"\n{advise_linear.advice(linear, shapes, options.tp, folder)}")
    return 0


def check(options: argparse.Namespace) -> None:
    """Raise ValueError unless the options name one question with sensible sizes."""
    shape, layer = (options.m, options.n, options.k), (options.model, options.tokens)
    if None not in shape and layer == (None, None):
        sizes = {"m": options.m, "n": options.n, "k": options.k}
    elif None not in layer and shape == (None, None, None):
        sizes = {"tokens": options.tokens}
    else:
        raise ValueError("give either --m, --n and --k, or --model and --tokens")
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"--{name} {size} must be at least 1")
    if options.tp < 2:
        raise ValueError(f"--tp {options.tp} has nothing to communicate; it must be at least 2")


def machine_folder(store: "Store", wanted: str) -> str:
    """The folder whose data to use; "auto": this host's own if it has the tables, else the one with most GPUs.

    Raises ValueError naming the folders that have the tables.
    """
    from study.harness.machine import this_machine

    def devices(name: str) -> tuple[bool, int]:
        entry = store.machine(name)
        return entry["kind"] == "cuda", entry["num_devices"]

    complete = [
        name for name in store.machines() if all((store.data / name / f"{table}.csv").exists() for table in TABLES)
    ]
    if wanted == "auto" and complete:
        own = store.folder_for(this_machine())
        return own if own in complete else max(complete, key=devices)
    if wanted not in complete:
        raise ValueError(
            f"machine {wanted!r} has no measurements to advise from; have: {', '.join(complete) or 'none'}; "
            "measure this one with: python -m study run"
        )
    return wanted


def advise(
    tables: Mapping[str, "pd.DataFrame"],
    tp: int,
    dtype: str = "bf16",
    shape: tuple[int, int, int] | None = None,
    model_name: str | None = None,
    tokens: int | None = None,
) -> "pd.DataFrame":
    """One row per technique whose all-reduce was measured by itself: times alone in µs, share, gains and their error.

    Gains are over the default collective followed by the matmul; the best technique comes first.
    `tables` are `when_to_overlap`, `bandwidth` and `environment` of one machine. Either `shape` = (m, n, k) of the
    whole row-parallel matmul, or `model_name` and `tokens`. `held_out_error` is the median |predicted / measured − 1|
    of the technique on the points that its fit, to `num_training` points, has not seen. Raises ValueError naming the
    wrong value and the valid ones.
    """
    import pandas as pd

    from study.costs import BYTES_PER_ELEMENT, AllReduceCost, MatmulCost
    from study.layers import ALL_REDUCES_PER_LAYER, layer_times_us
    from study.models import model_dimensions
    from study.sections.overlap.methods import DEFAULT_BACKEND
    from study.sections.when_to_overlap import model
    from study.sections.when_to_overlap.section import backend_of, fitted

    if dtype not in BYTES_PER_ELEMENT:
        raise ValueError(f"unknown dtype {dtype!r}; the dtypes are {', '.join(BYTES_PER_ELEMENT)}")
    when, bandwidth = tables["when_to_overlap"], tables["bandwidth"]
    matmul = MatmulCost.from_environment(tables["environment"], dtype)
    measured = set(bandwidth.loc[bandwidth["collective"].eq("all_reduce") & bandwidth["correct"], "backend"])

    def times_us(backend: str) -> tuple[float, float, float, int, AllReduceCost]:
        """(all-reduce µs, matmul µs, bytes of one all-reduce, number of them, cost) with this backend."""
        cost = AllReduceCost.from_bandwidth(bandwidth, backend)
        if shape is None:
            dimensions = model_dimensions(model_name)
            comm, comp = layer_times_us(dimensions, tokens, tp, matmul, cost)
            return comm, comp, tokens * dimensions.hidden * matmul.element_bytes, ALL_REDUCES_PER_LAYER, cost
        m, n, k = shape
        if k % tp:
            raise ValueError(f"tp = {tp} does not divide k = {k}")
        num_bytes = m * n * matmul.element_bytes
        return cost.time_us(num_bytes, tp), matmul.time_us(m, n, k // tp), num_bytes, 1, cost

    # A slow collective hides well and still loses: every technique is judged against the default one, not overlapped.
    default = next((name for name in DEFAULT_BACKEND.values() if name in measured), None)
    baseline_us = sum(times_us(default)[:2]) if default else None
    rows = []
    for method, judged in when.groupby("method", sort=False):
        backend = backend_of(when, method)
        if backend not in measured:
            continue
        t_comm, t_comp, num_bytes, joins, all_reduce = times_us(backend)
        rows.append(
            {
                "method": method,
                "t_matmul_us": t_comp,
                "t_comm_us": t_comm,
                **model.gain(t_comm, t_comp, fitted(when, method), joins, baseline_us),
                "num_training": int(judged["num_training"].iloc[0]),
                "held_out_error": judged.loc[judged["held_out"], "error"].abs().median(),
                "extrapolated": tp != all_reduce.ranks or not all_reduce.covers(num_bytes, tp),
            }
        )
    if not rows:
        raise ValueError(
            f"table bandwidth has a correct all_reduce of {', '.join(sorted(measured)) or 'no backend'}, of none that "
            f"the techniques use ({', '.join(when['backend'].unique())})"
        )
    return pd.DataFrame(rows).sort_values("gain", ascending=False, kind="stable")


def usage(rows: "pd.DataFrame") -> str:
    """How to do it, from rows of `advise`: by the planner, and by hand as the best technique that surely helps.

    Surely: beyond the error of a fit that could have missed its points.
    """
    from study.sections.overlap.methods import METHODS, RETIRED
    from study.sections.when_to_overlap.section import testable

    lines = [
        "To use it: from maco_lib.overlap import overlap, Plan",
        '  result, total = overlap(lambda: x @ w, tensor, plan="auto")   finds what is fastest on your own calls, and '
        "does not overlap where that loses",
    ]
    sure = rows[rows["verdict"].eq("helps") & rows["num_training"].map(testable)]
    helping = [method for method in sure["method"] if method in METHODS["device"] and method not in RETIRED]
    if helping:
        plan = METHODS["device"][helping[0]]
        lines.append(f"  result, total = overlap(lambda: x @ w, tensor, plan={plan!r})   {helping[0]}")
    else:
        lines.append("No technique above is predicted to help here beyond its error.")
    return "\n".join(lines)


def as_text(rows: "pd.DataFrame") -> str:
    """The rows as a table for a terminal."""
    import pandas as pd

    from study.sections.when_to_overlap.section import testable

    shown = pd.DataFrame(
        {
            "technique": rows["method"],
            "matmul µs": rows["t_matmul_us"].map("{:.1f}".format),
            "all-reduce µs": rows["t_comm_us"].map("{:.1f}".format),
            "comm. share": rows["comm_share"].map("{:.0%}".format),
            "ideal gain": rows["ideal_gain"].map("{:.2f}x".format),
            "predicted gain": [f"{row.gain:.2f}x [{row.gain_lo:.2f}, {row.gain_hi:.2f}]" for row in rows.itertuples()],
            "fitted to": [f"{number} points" for number in rows["num_training"]],
            "model's error": [
                f"{row.held_out_error:.1%}" if testable(row.num_training) else "not testable"
                for row in rows.itertuples()
            ],
            "verdict": rows["verdict"],
            "extrapolated": rows["extrapolated"].map({True: "yes", False: "no"}),
        }
    )
    return shown.to_string(index=False)
