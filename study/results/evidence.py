"""All that is stored of one machine, read once for the report and the claims."""

import datetime
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from study.harness.machine import Machine
from study.harness.markdown import verbatim
from study.results.status import COMPLETE, FAILED, RUNNING, UNAVAILABLE, recorded_parameters, stale_tables
from study.results.store import DataError, Store
from study.sections.registry import SECTIONS


class Missing(Exception):
    """A table that a statement needs is not there; `reason` says why, and as a string it is Markdown."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return verbatim(self.reason)


@dataclass(frozen=True)
class SectionState:
    """How a section stands: `state` is complete, running, failed, stale, unavailable, interrupted or missing.

    `seconds` is what its launches took together, or where it has none what the notebook did.
    """

    state: str
    error: str = ""
    profile: str = ""
    seconds: float = 0.0
    at: str = ""

    @property
    def usable(self) -> bool:
        return self.state == COMPLETE


@dataclass(frozen=True, eq=False)
class Evidence:
    """One machine: its description, its tables by name, and by name of a table the reason it cannot be used.

    Equal to itself only, so that what is computed from it can be kept.
    """

    name: str
    hardware: str
    kind: str
    description: dict[str, Any]
    sections: dict[str, SectionState]
    versions: dict[str, str]
    records: dict[str, dict[str, Any]] = field(repr=False)
    tables: dict[str, pd.DataFrame] = field(repr=False)
    reasons: dict[str, str] = field(repr=False)

    def table(self, name: str) -> pd.DataFrame:
        """The table; raises Missing with the reason when it cannot be used."""
        if name not in self.tables:
            raise Missing(self.reasons[name])
        return self.tables[name]

    def hosts(self, section: str) -> set[str]:
        """The identities of the hosts that the section's reported rows were measured on."""
        launches = self.records[section].get("launches", {}).values()
        return {launch["machine"]["identity"] for launch in launches if "machine" in launch}

    def measured(self, section: str | None = None) -> tuple[str, str]:
        """When the first launch of a section (None: of all) began and the last ended, UTC to the minute; "" for none.

        A launch that was killed recorded no end: its begin counts.
        """
        names = [section] if section else list(self.records)
        launches = [launch for name in names for launch in self.records[name].get("launches", {}).values()]
        begun = [(datetime.datetime.fromisoformat(launch["time"]), launch) for launch in launches if "time" in launch]
        ended = [begin + datetime.timedelta(seconds=launch.get("seconds", 0.0)) for begin, launch in begun]
        ends = (min(begin for begin, _ in begun), max(ended)) if begun else ()
        first, last = [f"{end:%Y-%m-%d %H:%M}" for end in ends] or ("", "")
        return first, last

    def settings(self) -> dict[str, str]:
        """The environment variables that were set in every launch."""
        launches = [launch for record in self.records.values() for launch in record.get("launches", {}).values()]
        shared = [set(launch.get("environment", {}).items()) for launch in launches]
        return dict(sorted(set.intersection(*shared))) if shared else {}


def load(store: Store, name: str) -> tuple[Evidence, list[str]]:
    """Everything of data/`name`/, and a problem for each damaged file, which is left out and not raised."""
    machine = store.measured_machine(name)
    sections, records, tables, reasons, versions, problems = {}, {}, {}, {}, {}, []
    for section in SECTIONS.values():
        try:
            records[section.name] = record = store.record(name, section.name)
            if record:
                record["launches"] = reported_launches(store, name, section, record)
            sections[section.name] = state_of(store, name, section, machine, records[section.name])
        except DataError as error:
            problems.append(str(error))
            records[section.name], sections[section.name] = {}, SectionState(FAILED, str(error))
        for launch in records[section.name].get("launches", {}).values():
            versions.update(launch.get("versions", {}))
        for table in section.tables:
            if table not in records[section.name].get("tables", {}):
                state = sections[section.name]
                reasons[table] = (
                    f"section {section.name} is {state.state}: {state.error}"
                    if state.error
                    else f"section {section.name} was run without the table {table}"
                )
                continue
            try:
                tables[table] = store.read(name, table)
            except DataError as error:
                reasons[table] = str(error)
                problems.append(str(error))
                sections[section.name] = SectionState(FAILED, str(error))
    about = (machine.name, machine.kind, machine.description)
    return Evidence(name, *about, sections, versions, records, tables, reasons), problems


def reported_launches(store: Store, name: str, section, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The record's launches, without those that only rows of other parameters are of: such rows stay stored."""
    reported, others = set(), set()
    for dataset in section.datasets:
        if dataset.name not in record.get("tables", {}):
            continue
        try:
            rows = store.launches(name, dataset.name)
        except DataError:
            continue  # `load` tells what is wrong with the table
        asked = rows["point_key"].isin(record["tables"][dataset.name]["keys"])
        reported |= set(rows[asked]["launch"])
        others |= set(rows[~asked]["launch"])
    launches = record.get("launches", {})
    return {launch: facts for launch, facts in launches.items() if launch not in others - reported}


def state_of(store: Store, name: str, section, machine: Machine, record: dict[str, Any]) -> SectionState:
    """The section's recorded verdict; "stale" where it was complete and the stored tables are not what is asked now."""
    if not record:
        return SectionState("missing", "never run on this machine")
    verdict = record.get("verdict", {"state": RUNNING, "error": ""})
    launched = sum(launch.get("seconds", 0.0) for launch in record.get("launches", {}).values())
    seconds = launched or verdict.get("seconds", 0.0)
    facts = {"profile": record.get("profile", ""), "seconds": seconds, "at": verdict.get("at", "")}
    if verdict["state"] in (FAILED, UNAVAILABLE):
        return SectionState(verdict["state"], verdict["error"], **facts)
    try:
        stale = stale_tables(store, name, section, machine, recorded_parameters(section, record), record)
    except (ValueError, KeyError) as error:
        stale = [str(error)]
    if verdict["state"] == RUNNING and store.running(name) == section.name:
        return SectionState(RUNNING, "a run is measuring it", **facts)
    if verdict["state"] == RUNNING:
        return SectionState("interrupted", "; ".join(["a run began and did not end", *stale]), **facts)
    return SectionState("stale", "; ".join(stale), **facts) if stale else SectionState(COMPLETE, **facts)
