"""Measure what is missing of a dataset: torchrun children, each watched, timed out and killed with all it started."""

import os
import secrets
import subprocess
import sys
import time

from study.harness.files import CHECKOUT, without_places, write_json
from study.harness.journal import drop_torn_line
from study.harness.locks import held
from study.harness.machine import Machine, num_cores
from study.harness.progress import Progress
from study.harness.provenance import provenance
from study.harness.rates import Rates
from study.harness.sampler import Sampler
from study.harness.spec import Dataset, Point, SectionParameters
from study.harness.watch import START_S, stacks_path, stall_bound, watch
from study.results.store import Store
from study.sections import registry as sections

LOG_LINES = 25
LABEL_LENGTH = 70


class LaunchError(RuntimeError):
    """An experiment program failed, hung or was killed; the message carries the end of its log."""


def labels(points: list[Point]) -> list[str]:
    """What tells each point from the others, short enough for a progress bar."""
    varying = [name for name in points[0] if len({point.get(name) for point in points}) > 1]
    return [", ".join(f"{name}={point[name]}" for name in varying if name in point)[:LABEL_LENGTH] for point in points]


def plan(dataset: Dataset, parameters: SectionParameters, machine: Machine) -> list[Point]:
    """The dataset's points for these parameters; ValueError on more ranks than devices or on a repeated point."""
    num_ranks = dataset.num_ranks(parameters, machine)
    devices = machine.num_devices if machine.kind == "cuda" else max(2, machine.num_devices)
    if num_ranks > devices:
        kind = "GPUs" if machine.kind == "cuda" else "CPU cores (2 ranks always fit)"
        raise ValueError(f"{dataset.name}: num_ranks = {num_ranks}, but this machine has {machine.num_devices} {kind}")
    points = [{**point, "num_ranks": num_ranks} for point in dataset.points(parameters, machine)]
    keys = [dataset.key(point) for point in points]
    if len(set(keys)) < len(keys):
        twice = next(point for point, key in zip(points, keys, strict=True) if keys.count(key) > 1)
        raise ValueError(f"{dataset.name}: the parameters ask for the same point twice: {twice}")
    return points


def repeats(dataset: Dataset, parameters: SectionParameters, points: list[Point]) -> list[tuple[Point, int]]:
    """The (point, repeat) pairs that the parameters ask for, launch after launch."""
    counts = [dataset.num_launches(parameters, point) for point in points]
    return [
        (point, repeat)
        for repeat in range(max(counts, default=0))
        for point, count in zip(points, counts, strict=True)
        if repeat < count
    ]


def missing(store: Store, name: str, dataset: Dataset, pairs: list[tuple[Point, int]]) -> list[tuple[Point, int]]:
    """Those of the (point, repeat) pairs that are not measured yet."""
    done = store.measured(name, dataset.name)
    return [(point, repeat) for point, repeat in pairs if (dataset.key(point), repeat) not in done]


def measure(
    store: Store,
    name: str,
    dataset: Dataset,
    parameters: SectionParameters,
    machine: Machine,
    rates: Rates,
    force: bool = False,
) -> int:
    """Measure the missing points (all of them with `force`) and store the table; returns how many were measured.

    Finished points survive any failure in the journal, and the next call goes on from there.
    """
    points = plan(dataset, parameters, machine)
    pairs = repeats(dataset, parameters, points)
    if not pairs and not (store.data / name / f"{dataset.name}.csv").exists():
        return 0
    busy = f"another run is measuring into data/{name}; wait for it or stop it"
    with held(store.journal_folder(name) / "lock", busy):
        journal = store.journal(name, dataset.name)
        drop_torn_line(journal)
        todo = pairs if force else missing(store, name, dataset, pairs)
        launches: dict[tuple, list[Point]] = {}
        for point, repeat in todo:
            launches.setdefault((repeat, *dataset.group(point)), []).append(point)
        with Progress(dataset.name, len(pairs), len(todo)) as progress:
            for (repeat, *_), entries in launches.items():
                launch(store, name, dataset, entries, repeat, machine, rates, progress)
        keys = [dataset.key(point) for point in points]
        current = store.record(name, sections.table(dataset.name)[0].name).get("tables", {}).get(dataset.name, {})
        if todo or journal.exists() or current.get("keys") != keys:
            store.merge_journal(name, dataset, keys)
    return len(todo)


def launch(
    store: Store,
    name: str,
    dataset: Dataset,
    points: list[Point],
    repeat: int,
    machine: Machine,
    rates: Rates,
    progress: Progress,
) -> None:
    """One torchrun of the dataset's program over `points`; raises LaunchError unless every one was measured."""
    folder = store.journal_folder(name)
    identifier = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
    events, log = folder / f"{identifier}.events", folder / f"{identifier}.log"
    num_ranks = points[0]["num_ranks"]
    stall_s = stall_bound(dataset.longest_step_s(points, rates))
    specification = {
        "kind": machine.kind,
        "launch": identifier,
        "repeat": repeat,
        "collective_timeout_s": START_S + 2 * stall_s,
        "events": str(events),
        "journal": str(store.journal(name, dataset.name)),
        "points": [
            {"key": dataset.key(point), "point": point, "label": label}
            for point, label in zip(points, labels(points), strict=True)
        ],
    }
    specification_path = folder / f"{identifier}.spec.json"
    write_json(specification_path, specification)
    program = dataset.program
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "-m", program]
    facts = {
        "table": dataset.name,
        "program": program,
        "num_ranks": num_ranks,
        "machine_folder": name,
        **provenance(CHECKOUT, machine),
        "command": f"torchrun --standalone --nproc-per-node {num_ranks} -m {program}",
    }
    facts_path = folder / f"{identifier}.json"
    write_json(facts_path, facts)  # before the start: a point in the journal always finds its launch
    supervisor = [sys.executable, "-m", "study.harness.supervise", sys.executable, *torchrun, str(specification_path)]
    begin = time.monotonic()
    with open(log, "ab") as output, Sampler() as sampler:
        process = subprocess.Popen(
            supervisor,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=child_environment(machine, num_ranks),
            start_new_session=True,
        )
        try:
            why = watch(process, events, progress, num_ranks, len(points), stall_s)
            # Before the program is ended: what torchrun says of our own signal explains nothing.
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        finally:
            process.stdin.close()
            process.wait()
    write_json(facts_path, {**facts, "seconds": round(time.monotonic() - begin, 1), "sampled": sampler.summary()})
    for path in (events, specification_path):
        path.unlink()
    for path in (stacks_path(events, rank) for rank in range(num_ranks)):
        if path.exists() and not path.stat().st_size:
            path.unlink()
    if why:
        told = without_places("\n".join(tail))
        raise LaunchError(f"{program} {why}. Its log is {os.path.relpath(log, store.root)} and ends:\n{told}")
    log.unlink()


def child_environment(machine: Machine, num_ranks: int) -> dict[str, str]:
    """The environment of the ranks: this package importable, and the cores shared out fairly among the ranks."""
    path = os.pathsep.join(part for part in (str(CHECKOUT), os.environ.get("PYTHONPATH")) if part)
    threads = max(1, num_cores() // num_ranks)
    given = {"PYTHONPATH": path, "PYTHONUTF8": "1"}
    return {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", **os.environ, **given}
