"""REPORT.md: the sections of the published study, written from stored data and figures only."""

import collections
import functools
import pathlib
import statistics
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
import pandas as pd

from study.claims.judge import judge
from study.harness.files import write_atomically
from study.harness.markdown import address, code, lines, verbatim
from study.published import tables as published
from study.published.criteria import CRITERIA, LEAST_IDEAL_GAIN, LINEAR_MANY_ROWS
from study.report import (
    clocks,
    eager,
    figures,
    findings,
    ideal_findings,
    judgement_tables,
    linear,
    linear_limits,
    linear_memory_order,
    linear_persistent,
    pictures,
    planner,
    report_tables,
    reproduction,
    sharing,
    techniques,
    when_tables,
)
from study.report import linear_targets as linear_promises
from study.results.evidence import Evidence, Missing, load
from study.results.status import UNAVAILABLE
from study.results.store import DataError, Store
from study.sections.registry import SECTIONS

TEMPLATE = pathlib.Path(__file__).with_name("report.md.j2")
HINT = "measure it with: ./run_all.sh --only"


def build(root: pathlib.Path, redraw: bool = True, processes: int = 1) -> list[str]:
    """Write every machine's figures (with `redraw` false only the missing ones) and REPORT.md below `root`.

    Prints a line a machine. Returns one sentence for each stored file that is damaged, each figure of a complete
    section that cannot be drawn and each part that fails; the report shows them in place. Raises OSError or ValueError
    when the published tables cannot be read.
    """
    store, machines, problems = Store(root), [], []
    for name in store.machines():
        try:
            evidence, damaged = load(store, name)
        except DataError as error:
            problems.append(str(error))
            continue
        machines.append(evidence)
        problems += damaged
    machines.sort(key=lambda machine: (machine.kind == "cpu", machine.name))
    shown, undrawn = pictures.draw_all(store, machines, redraw, processes)
    problems += undrawn
    written = render(store.root, machines, shown, problems)
    path = store.root / "REPORT.md"
    if not path.exists() or path.read_bytes() != written.encode():  # HTML and PDF are made anew from a newer one
        write_atomically(path, written.encode())
    return list(dict.fromkeys(problems))


def render(root: pathlib.Path, machines: list[Evidence], shown: dict[str, dict[str, str]], problems: list[str]) -> str:
    """The report's text; `shown` are its pictures by machine and name. A part that fails is added to `problems`.

    Every name the template uses must be given here: an unknown one is an error.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    judged, store = {machine.name: judge(machine, root) for machine in machines}, Store(root)
    environment.filters["verbatim"] = verbatim
    template = TEMPLATE.read_text(encoding="utf-8")
    return environment.from_string(template).render(
        root=root,
        address=address,
        machines=machines,
        problems=list(dict.fromkeys(problems)),
        tables=report_tables,
        when=when_tables,
        LEAST_IDEAL_GAIN=LEAST_IDEAL_GAIN,
        LINEAR_MANY_ROWS=LINEAR_MANY_ROWS,
        verdicts=judgement_tables,
        techniques=techniques,
        clocks=clocks,
        planner=planner,
        sharing=sharing,
        eager=eager,
        linear=linear,
        linear_limits=linear_limits,
        memory_order=linear_memory_order,
        linear_persistent=linear_persistent,
        linear_promises=linear_promises,
        take_home=findings.take_home,
        numbers_behind=findings.numbers_behind,
        overview=ideal_findings.overview,
        published_wait=findings.published_wait,
        reproduction=reproduction.lines,
        average=findings.average_sentence,
        attempt=functools.partial(attempt, problems),
        attempt_lines=functools.partial(attempt_lines, problems),
        states=states,
        caveats=caveats,
        picture=lambda machine, name: shown[machine.name].get(name, ""),
        further=functools.partial(further, template),
        judged=judged,
        criteria=CRITERIA,
        printed=published.printed,
        sections=SECTIONS,
        index=index,
        measured=functools.partial(measured, store),
        replays=functools.partial(replays, store),
    )


def further(template: str, section: str) -> list[str]:
    """The section's figures that the template does not name."""
    return [name for name in figures.of_section(section) if f'"{name}"' not in template]


def attempt(problems: list[str], make: Callable[..., str], machine: Evidence, *arguments) -> str:
    """`make(machine, ...)`, or in its place the reason why the data for it is not there.

    What fails otherwise ends only itself: it is told in its place and added to `problems`.
    """
    try:
        return make(machine, *arguments)
    except Missing as missing:
        return f"*Not available on {verbatim(machine.name)}: {missing}*"
    except Exception as error:
        return f"*Not available on {verbatim(machine.name)}: {failed(problems, make, machine, error)}*"


def attempt_lines(problems: list[str], make: Callable[..., list], machine: Evidence, *arguments) -> list:
    """The same for what gives several lines."""
    try:
        return make(machine, *arguments)
    except Missing as missing:
        return [f"*not available: {missing}*"]
    except Exception as error:
        return [f"*not available: {failed(problems, make, machine, error)}*"]


def failed(problems: list[str], make: Callable, machine: Evidence, error: Exception) -> str:
    """What went wrong in a part of the report, added to `problems`; the traceback, for who mends it, goes to stderr."""
    traceback.print_exception(error)
    told = f"{make.__module__}.{make.__name__} failed: {type(error).__name__}: {error}"
    problems.append(f"report of {machine.name}: {told}")
    return verbatim(told)


def states(machines: list[Evidence], section: str) -> str:
    """A line per machine on which the section is not complete, rests on stale data or is of more than one commit: what
    happened, what to do."""
    told = []
    for machine in machines:
        state, name = machine.sections[section], verbatim(machine.name)
        if not state.usable:
            error = lines(state.error, "> ") or "no reason recorded"
            told.append(f"> **{name}: section {section} is {state.state.upper()}.** {error} ({HINT} {section})")
        elif stale := [need for need in SECTIONS[section].needs if machine.sections[need].state == "stale"]:
            told.append(
                f"> **{name}: section {section} rests on stale data**, of {' and '.join(stale)} "
                f"({HINT} {' '.join(stale)})"
            )
        elif commits := of_commits(machine, section):
            told.append(f"> {name}: section {section} was measured at more than one commit: {commits}")
    return "\n>\n".join(told)


def of_commits(machine: Evidence, section: str) -> str:
    """By table the commits that its launches ran; "" where they all ran the same one."""
    commits: dict[str, set[str]] = {}
    for launch in machine.records[section].get("launches", {}).values():
        commits.setdefault(launch.get("table", section), set()).add(commit_of(launch.get("git", {})))
    if len(set().union(*commits.values())) < 2:
        return ""
    return "; ".join(f"{table} {', '.join(sorted(of_table))}" for table, of_table in commits.items())


def caveats(machine: Evidence) -> str:
    """Its sections that were begun and are not complete: " (stale: overlap, bandwidth; failed: inference)", or ""."""
    sections: dict[str, list[str]] = {}
    for name, state in machine.sections.items():
        if not state.usable and state.state not in ("missing", UNAVAILABLE):
            sections.setdefault(state.state, []).append(name)
    told = "; ".join(f"{state}: {', '.join(names)}" for state, names in sections.items())
    return f" ({told})" if told else ""


def index(machines: list[Evidence]) -> str:
    """Figure → notebook → command → minutes → hardware."""
    rows = []
    for name, spec in figures.FIGURES.items():
        section = SECTIONS[spec.section]
        for machine in machines:
            state = machine.sections[spec.section]
            if state.usable:
                rows.append([
                    name, f"notebooks/{section.notebook}",
                    code(f"./run_all.sh --only {section.name} --profile {state.profile}"),
                    f"{state.seconds / 60:.1f}", verbatim(machine.name),
                ])  # fmt: skip
    return report_tables.table(rows, ["figure", "notebook", "command", "minutes (section)", "hardware"])


def measured(store: Store, machines: list[Evidence]) -> str:
    """Per machine and section: profile, until when, hosts, launches, commits, whether code was modified, replays."""
    rows = []
    for machine in machines:
        for name, state in machine.sections.items():
            launches = machine.records[name].get("launches", {}).values()
            commits = sorted({commit_of(launch.get("git", {})) for launch in launches})
            ranks = sorted({launch["num_ranks"] for launch in launches if "num_ranks" in launch})
            hosts = len(machine.hosts(name))
            rows.append([verbatim(machine.name), name, state.state, verbatim(state.profile),
                         machine.measured(name)[1], str(hosts), launches_of(launches), ", ".join(map(str, ranks)),
                         runs_in_a_replay(store, machine, name), verbatim(sizes_of(machine.records[name])),
                         samples_of_an_arm(store, machine, name), forecast_of(machine.records[name]),
                         ", ".join(commits)])  # fmt: skip
    return report_tables.table(
        rows,
        ["machine", "section", "state", "profile", "measured until (UTC)", "hosts", "launches", "ranks",
         "runs in a replay", "type, sizes", "samples of an arm", "minutes forecast, taken", "commit"],
    )  # fmt: skip


def launches_of(launches: Iterable[dict[str, Any]]) -> str:
    """How many processes measured each table: "overlap 3, sm_sharing 1"; only the number where it is one table."""
    counts = collections.Counter(launch.get("table", "") for launch in launches)
    if len(counts) < 2:
        return str(counts.total()) if counts else report_tables.ABSENT
    return ", ".join(f"{table} {count}" for table, count in counts.items())


def replays(store: Store, machines: list[Evidence], section: str) -> str:
    """How many runs the replays of a section held, and what few of them do to its times; "" where none was replayed."""
    counts = {machine.name: runs_in_a_replay(store, machine, section) for machine in machines}
    told = [f"{verbatim(name)} {runs}" for name, runs in counts.items() if runs != report_tables.ABSENT]
    return (
        f"Runs in a timed replay, the least, the median and the most over all arms: {'; '.join(told)}. "
        "Where they were few, [short times are too long](#how-it-was-measured).\n"
        if told
        else ""
    )


def sizes_of(record: dict[str, Any]) -> str:
    """The type that a section was measured in, and by what its sizes were divided."""
    parameters = record.get("parameters", {})
    shrink = parameters.get("shrink", 1)
    told = [parameters.get("dtype", ""), f"sizes / {shrink}" if shrink > 1 else "", parameters.get("model", "")]
    return ", ".join(filter(None, told)) or report_tables.ABSENT


def samples_of_an_arm(store: Store, machine: Evidence, section_name: str) -> str:
    """The least, the median and the most samples of an arm in one launch, over the reported points."""
    counts: list[int] = []
    for samples in reported_samples(store, machine, section_name):
        arms = [name for name in samples if name in ("point_key", "launch", "quantity") or name.startswith("label_")]
        counts += samples[samples["rank"] == 0].groupby(arms, dropna=False).size().tolist()
    return least_median_most(counts)


def reported_samples(store: Store, machine: Evidence, section_name: str) -> Iterator[pd.DataFrame]:
    """The raw samples of the reported points, of each of the section's tables that has any."""
    tables = machine.records[section_name].get("tables", {})
    for dataset in SECTIONS[section_name].datasets:
        if dataset.name not in tables:
            continue
        try:
            samples = store.samples(machine.name, dataset.name)
        except DataError:
            continue  # without raw samples there is nothing to count
        yield samples[samples["point_key"].isin(tables[dataset.name]["keys"])]


def least_median_most(counts: list[int]) -> str:
    return f"{min(counts)}, {statistics.median(counts):.0f}, {max(counts)}" if counts else report_tables.ABSENT


def forecast_of(record: dict[str, Any]) -> str:
    """Minutes that the last measurement was forecast to take and took; tables of earlier versions have none."""
    forecast = record.get("forecast")
    return f"{forecast['forecast_s'] / 60:.1f}, {forecast['took_s'] / 60:.1f}" if forecast else report_tables.ABSENT


def runs_in_a_replay(store: Store, machine: Evidence, section_name: str) -> str:
    """The least, the median and the most over all arms and launches of the reported points; "–" without a replay."""
    counts: list[int] = []
    for samples in reported_samples(store, machine, section_name):
        if "label_repeats" in samples:
            replayed = samples[samples["label_timing"] == "graph"]
            arms = replayed.drop_duplicates(["point_key", "launch", "label_arm"])
            counts += arms["label_repeats"].astype(int).tolist()
    return least_median_most(counts)


def commit_of(git: dict[str, Any]) -> str:
    """The commit a launch ran, short, marked where the tree held changes, and "unknown" where neither git nor user
    told it."""
    commit = git.get("commit")
    return (verbatim(commit[:7]) if commit else "unknown") + (" (modified)" if git.get("dirty") else "")
