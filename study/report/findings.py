"""The summary's findings: what stands out in one machine's data, worded from its numbers, and the figure for it.

Every candidate below looks at one machine's tables and gives a `Found`, or raises Missing with the reason why it cannot
be told there. The first NUM_FINDINGS of them that the intervals decide are the ones to take home.
"""

import math
import pathlib

import pandas as pd

from study.claims.measured import inference_ratio, overlap_ratio
from study.drawing.looks import look
from study.harness.markdown import verbatim
from study.published import tables as published
from study.published.criteria import Ratio, milliseconds
from study.report import eager, linear_findings, techniques
from study.report.found import Candidate, Found, span, speedup
from study.report.ideal_findings import near_ideal
from study.results.evidence import Evidence, Missing
from study.sections.when_to_overlap.section import testable

NUM_FINDINGS = 5


def methods(evidence: Evidence, root: pathlib.Path, protocol: str) -> pd.DataFrame:
    """Finished rows of the published configurations in one protocol, by (configuration, method), as printed there."""
    names = published.numbers(root, "overlap")["configuration"].tolist()
    rows = evidence.table("overlap")
    rows = rows[rows["configuration"].isin(names) & (rows["protocol"] == protocol)].dropna(subset=["t_overlap_us"])
    if rows.empty:
        raise Missing(f"no published configuration was finished in the {protocol} protocol")
    return rows.set_index(["configuration", "method"])


def with_both(rows: pd.DataFrame, *names: str) -> list[str]:
    """The configurations that have every one of the methods `names`; raises Missing when none has."""
    found = [
        configuration
        for configuration in rows.index.get_level_values("configuration").unique()
        if all((configuration, name) in rows.index for name in names)
    ]
    if not found:
        raise Missing(f"no published configuration has {' and '.join(look(name).label for name in names)}")
    return found


def launch_order(evidence: Evidence, root: pathlib.Path) -> Found:
    """Two streams with the collective issued first against the same with the matmul issued first."""
    rows = methods(evidence, root, "device")
    gains, lines, parted = {}, [], 0
    for name in with_both(rows, "two_stream", "two_stream_matmul_first"):
        first, last = (overlap_ratio(evidence, name, "device", method)
                       for method in ("two_stream", "two_stream_matmul_first"))  # fmt: skip
        gains[name] = first.value, last.value
        parted += first.low > last.high or last.low > first.high
        lines.append(f"{name}: collective first {first}, matmul first {last}")
    most = max(gains, key=lambda name: abs(math.log(gains[name][0] / gains[name][1])))
    lines += [*waiting_collective(evidence), *eager.order(evidence)]
    effect = "decides what two streams gain" if parted else "makes no difference that the intervals would show"
    sentence = (
        f"The order of issue {effect}: the same two kernels give {span([first for first, _ in gains.values()])} with "
        f"the collective issued first and {span([last for _, last in gains.values()])} with the matmul first"
    )
    if parted:
        sentence += f"; the intervals part in {parted} of {len(gains)} configurations, most in “{most}”"
    return Found(sentence, "overlap_published", parted > 0, lines)


def waiting_collective(evidence: Evidence) -> list[str]:
    """From the profile: how long an all-reduce waited on a rank where the matmul had begun before it."""
    if "overlap_timeline" not in evidence.tables:
        return []
    events = evidence.tables["overlap_timeline"]
    events = events[(events["method"] == "two_stream") & (events["duration_us"] > 0)]
    starts = events.groupby(["configuration", "rank", "category"])["start_us"].min().unstack()
    if not {"comm", "compute"} <= set(starts):
        return []
    waits = (starts["comm"] - starts["compute"]).dropna()
    if waits.empty or waits.max() <= 0:
        return []
    name, rank = waits.idxmax()
    mine = events[(events["configuration"] == name) & (events["rank"] == rank)]
    into = waits.max() / mine.loc[mine["category"] == "compute", "duration_us"].sum()
    return [f"why: in the profile of “{name}” the matmul was the first to begin on rank {rank}, and the all-reduce "
            f"began {milliseconds(waits.max() / 1e3)} later, {into:.0%} into the matmul: the side that begins first "
            "holds the multiprocessors (figure `overlap_timeline`)"]  # fmt: skip


def leaner_collective(evidence: Evidence, root: pathlib.Path) -> Found:
    """The fastest method over another backend against overlapping the default one, split into its two factors."""
    rows = methods(evidence, root, "device")
    default = rows.xs("sequential", level="method")["backend"].iloc[0] if "sequential" in rows.index.levels[1] else ""
    lines, plain, best, parts, chosen, decided = [], [], [], [], ["two_stream"], False
    for name in with_both(rows, "two_stream"):
        others = rows.loc[name].drop(index=techniques.PLANNER, errors="ignore")  # it is one of the others
        others = others[~others["backend"].str.startswith(default)] if default else others.iloc[:0]
        if others.empty:
            continue
        method = others["t_overlap_us"].idxmin()
        row = others.loc[method]
        ratio = overlap_ratio(evidence, name, "device", method)
        before = rows.loc[(name, "two_stream")]
        lines.append(
            f"{name}: {look(method).label} {ratio} = {row['speedup_collective']:.2f}× from the collective itself · "
            f"{row['speedup_overlap']:.2f}× from overlapping it; {look(before['backend']).label} overlapped "
            f"{speedup(before['t_seq_us'], before['t_overlap_us'])}"
        )
        plain.append(before["speedup"])
        decided = decided or ratio.low > before["speedup_hi"]
        best.append(ratio.value)
        chosen.append(method)
        parts.append((row["speedup_collective"], row["speedup_overlap"]))
    if not lines:
        raise Missing("no other backend than the default one was overlapped")
    lines += stretches(evidence, chosen)
    faster = sum(one > other for one, other in zip(best, plain, strict=True))
    by_collective = sum(collective > overlap for collective, overlap in parts)
    return Found(
        f"The best other collective, overlapped, gives {span(best)}, where overlapping {look(default).label} gives "
        f"{span(plain)}: it is ahead in {faster} of {len(best)} configurations. The collective itself gives "
        f"{span([part for part, _ in parts])} of its speedup, overlapping it {span([part for _, part in parts])}; the "
        f"collective gives more in {by_collective} of {len(parts)}",
        "overlap_published", decided, lines,
    )  # fmt: skip


def stretches(evidence: Evidence, chosen: list[str]) -> list[str]:
    """How much the matmul slows beside the collective of each technique in `chosen`, from the fit of section 4."""
    if "when_to_overlap" not in evidence.tables:
        return []
    fits = evidence.tables["when_to_overlap"].drop_duplicates("method").sort_values("sigma_comp", kind="stable")
    fits = fits[fits["method"].isin(chosen)]
    if fits.empty:
        return []
    parts = [f"{look(row.method).label} {row.sigma_comp:.2f}"
             + ("" if testable(row.num_training) else f" (of {row.num_training} points: not testable)")
             for row in fits.itertuples()]  # fmt: skip
    return [f"how many times longer the matmul takes while the collective runs (fitted σ_comp): {', '.join(parts)}"]


def removed_wait(evidence: Evidence, root: pathlib.Path) -> Found:
    """How the published-style speedup splits into the removed synchronisation and the overlap."""
    rows = methods(evidence, root, "published")
    steps = ("sequential", "sequential_unsynchronised", "two_stream")
    waits, overlaps, lines, decided = [], [], [], False
    for name in with_both(rows, *steps):
        waiting, free, overlapped = (rows.loc[(name, step), "t_overlap_us"] for step in steps)
        whole = overlap_ratio(evidence, name)
        wait = overlap_ratio(evidence, name, method="sequential_unsynchronised")
        waits.append(waiting / free)
        overlaps.append(free / overlapped)
        decided = decided or wait.low > 1
        lines.append(f"{name}: {whole} = {waits[-1]:.2f}× [{wait.low:.2f}, {wait.high:.2f}] from the removed wait · "
                     f"{overlaps[-1]:.2f}× from the overlap; {share(whole.value, waits[-1])}")  # fmt: skip
    mean_wait, mean_overlap = (math.exp(sum(map(math.log, part)) / len(part)) for part in (waits, overlaps))
    return Found(
        f"In the published protocol the removed host synchronisation alone gives {span(waits)}, the overlap "
        f"{span(overlaps)} (geometric means {mean_wait:.2f}× and {mean_overlap:.2f}×)",
        "overlap_synchronisation", decided, lines,
    )  # fmt: skip


def share(whole: float, part: float) -> str:
    """What share of a speedup a factor of it makes up, on the logarithmic scale on which the factors add up."""
    if whole <= 1:
        return "no speedup to share out"
    of_whole = math.log(part) / math.log(whole)
    return f"the wait makes up {of_whole:.0%} of the speedup" if 0 <= of_whole <= 1 else (
        "all of the speedup is the removed wait" if of_whole > 1 else "none of the speedup is the removed wait"
    )  # fmt: skip


def inference(evidence: Evidence, root: pathlib.Path) -> Found:
    """How much of vLLM's gain compilation and graphs are, in each of the two engines."""
    printed = published.numbers(root, "inference").set_index("arm").loc["vllm", "speedup"]
    steps = "compilation and CUDA graphs" if evidence.kind == "cuda" else "compilation"
    pairs = {
        "vLLM over transformers eager": ("transformers_eager", "vllm"),
        f"{steps}, in vLLM": ("vllm_eager", "vllm"),
        "vLLM's engine and kernels without them": ("transformers_eager", "vllm_eager"),
        f"static cache and {steps}, in transformers": ("transformers_eager", "transformers_compiled"),
        "vLLM over compiled transformers": ("transformers_compiled", "vllm"),
    }
    ratios: dict[str, Ratio] = {}
    lines, untold = [], {}
    for label, (before, after) in pairs.items():
        try:
            ratios[label] = inference_ratio(evidence, before, after)
            lines.append(f"{label}: {ratios[label]}")
        except Missing as missing:
            untold.setdefault(missing.reason, []).append(label)
    lines += [f"not told ({verbatim(reason)}): {'; '.join(labels)}" for reason, labels in untold.items()]
    if len(hosts := evidence.hosts("inference")) > 1:
        lines.append(f"the arms were measured on {len(hosts)} hosts, which the intervals do not know")
    whole, graphs, engine, compiled, _ = (ratios.get(label) for label in pairs)
    if whole is None or graphs is None:
        if compiled is None:
            raise Missing("; ".join(untold))
        sentence = f"transformers gains {compiled} by a static cache and {steps}"
        if engine is not None:
            sentence += f"; vLLM's engine and kernels without {steps} gain {engine} over the same baseline"
        return Found(sentence, "inference_latency", compiled.low > 1, lines)
    part = math.log(graphs.value) / math.log(whole.value)
    sentence = f"vLLM's {whole.value:.2f}× (published {printed:.2f}×) "
    whole_part = f"comes to {part:.0%} from {steps}"
    sentence += whole_part if 0 < part <= 1 else f"holds a factor {graphs.value:.2f}× of {steps}"
    if compiled is not None:
        reached = math.log(compiled.value) / math.log(whole.value)
        sentence += f"; a static cache and {steps} take transformers itself to {compiled.value:.2f}×, {reached:.0%} of "
        sentence += "it (shares of the logarithm, on which factors add up)"
    return Found(sentence, "inference_attribution", graphs.low > 1, lines)


CANDIDATES: tuple[Candidate, ...] = (
    near_ideal,
    linear_findings.one_kernel,
    launch_order,
    leaner_collective,
    inference,
    removed_wait,
)


def take_home(evidence: Evidence, root: pathlib.Path) -> list[Found]:
    """The machine's findings, those that the intervals decide before others; raises Missing when there is none."""
    found, reasons = [], []
    for candidate in CANDIDATES:
        try:
            found.append(candidate(evidence, root))
        except Missing as missing:
            reasons.append(missing.reason)
    if not found:
        raise Missing("; ".join(dict.fromkeys(reasons)))
    return sorted(found, key=lambda one: not one.decided)[:NUM_FINDINGS]


def numbers_behind(found: list[Found | str]) -> str:
    """The lines of each finding below its number; "" where none has any."""
    return "\n\n".join(
        "\n".join([f"Finding {number}:", "", *(f"- {line}" for line in one.lines)])
        for number, one in enumerate(found, 1)
        if isinstance(one, Found) and one.lines
    )


def published_wait(evidence: Evidence, root: pathlib.Path) -> list[str]:
    """The lines of `removed_wait`, below its sentence."""
    found = removed_wait(evidence, root)
    return [found.sentence, *found.lines]


def average_sentence(evidence: Evidence, root: pathlib.Path) -> str:
    """The average over the published configurations in both protocols, as the published study's conclusion has it."""
    names = published.numbers(root, "overlap")["configuration"]
    parts = []
    for protocol in ("published", "device"):
        ratios = [overlap_ratio(evidence, name, protocol) for name in names]
        values = [ratio.value for ratio in ratios]
        parts.append(
            f"{sum(values) / len(values):.2f}× on average, {min(values):.2f}–{max(values):.2f}× "
            f"in the {protocol} protocol"
        )
    return "; ".join(parts)
