"""How a section stands on a machine: running, fresh, code moved since, stale, failed, interrupted, unavailable or
missing."""

import hashlib
from dataclasses import dataclass
from typing import Any

from study.harness.files import CHECKOUT
from study.harness.machine import Machine
from study.harness.provenance import source_digest
from study.harness.spec import Derived, Section, SectionParameters
from study.results.launch import missing, plan, repeats
from study.results.store import DataError, Store

COMPLETE, FAILED, UNAVAILABLE, RUNNING = "complete", "failed", "unavailable", "running"


@dataclass(frozen=True)
class Status:
    """`state` is one of the words above; `detail` says which input changed, which points are missing or what failed.

    A point whose arm failed is measured: what the failure says stays until `--force` measures it again.
    """

    state: str
    detail: str = ""

    @property
    def settled(self) -> bool:
        """Whether running the section again would measure nothing new."""
        return self.state in ("fresh", "code moved", "unavailable")


def input_digest(store: Store, name: str, table: Derived, parameters: SectionParameters) -> str:
    """SHA-256 over the inputs of a derived table: the stored tables, the parameters and the method version."""
    total = hashlib.sha256(f"{table.method_version} {parameters.model_dump_json()}".encode())
    for needed in table.inputs:
        total.update(store.checksum(name, needed).encode())
    return total.hexdigest()


def recorded_parameters(section: Section, record: dict[str, Any]) -> SectionParameters:
    """The parameters a section was last run with; raises ValueError when the section no longer takes them."""
    try:
        return section.parameters(**record["parameters"])
    except ValueError as error:
        raise ValueError(f"its parameters have changed their form: {error}") from None


def section_status(
    store: Store, name: str, section: Section, machine: Machine, parameters: SectionParameters | None = None
) -> Status:
    """How `section` stands in data/<name>/ for `parameters` (default: those it was last run with)."""
    if store.running(name) == section.name:
        return Status(RUNNING, "a run is at it")
    try:
        record = store.record(name, section.name)
    except DataError as error:
        return Status("failed", str(error))
    if not record:
        return Status("missing", "never run here")
    verdict = record.get("verdict", {"state": RUNNING})
    if verdict["state"] == FAILED:
        return Status("failed", verdict["error"].splitlines()[0])
    if verdict["state"] == RUNNING:
        return Status("interrupted", "a run began and did not end")
    try:
        parameters = parameters or recorded_parameters(section, record)
        problems = stale_tables(store, name, section, machine, parameters, record)
    except (DataError, ValueError) as error:
        return Status("failed", str(error).splitlines()[0])
    if problems:
        return Status("stale", "; ".join(problems))
    if verdict["state"] == UNAVAILABLE:
        return Status("unavailable", verdict["error"].splitlines()[0])
    moved = [
        table
        for table, entry in record.get("tables", {}).items()
        if entry.get("source_sha256") != source_digest(CHECKOUT)
    ]
    failed = failed_rows(store, name, section, record)
    if moved:
        return Status("code moved", "; ".join([f"since {', '.join(moved)} was written", *failed]))
    return Status("fresh", "; ".join(failed))


def failed_rows(store: Store, name: str, section: Section, record: dict[str, Any]) -> list[str]:
    """For each stored table with rows whose arm failed, how many there are."""
    counts = []
    for dataset in section.datasets:
        rows = store.read(name, dataset.name) if dataset.name in record.get("tables", {}) else ()
        failed = int((~rows["correct"]).sum()) if "correct" in rows else 0
        if failed:
            counts.append(f"{dataset.name}: {failed} of {len(rows)} rows failed")
    return counts


def stale_tables(
    store: Store, name: str, section: Section, machine: Machine, parameters: SectionParameters, record: dict[str, Any]
) -> list[str]:
    """One sentence for each table that is not what `parameters` ask for."""
    problems = []
    tables = record.get("tables", {})
    for dataset in section.datasets:
        if dataset.unavailable(parameters, machine):
            continue
        stored = tables.get(dataset.name, {})
        if not stored and not dataset.points(parameters, machine):
            continue
        if stored and stored["method_version"] != dataset.method_version:
            problems.append(
                f"{dataset.name}: measured by method version {stored['method_version']}, now it is "
                f"{dataset.method_version}"
            )
            continue
        points = plan(dataset, parameters, machine)
        pairs = repeats(dataset, parameters, points)
        todo = missing(store, name, dataset, pairs)
        if todo:
            problems.append(f"{dataset.name}: {len(todo)} of {len(pairs)} points not measured")
        elif stored.get("keys") != [dataset.key(point) for point in points]:
            problems.append(f"{dataset.name}: the reported rows are those of other parameters")
        else:
            store.read(name, dataset.name)
    for table in section.derived:
        if table.name not in tables:
            if not any(dataset.unavailable(parameters, machine) for dataset in section.datasets):
                problems.append(f"{table.name}: not computed")
        elif tables[table.name].get("inputs_sha256") != input_digest(store, name, table, parameters):
            problems.append(f"{table.name}: an input changed ({', '.join(table.inputs)})")
        else:
            store.read(name, table.name)
    return problems
