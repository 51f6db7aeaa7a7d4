"""Run the study: every section's notebook in a supervised child, judged by its own verdict, then the report."""

import contextlib
import json
import os
import pathlib
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from study.commands.rebuild import write_report
from study.drawing.style import FORMATS
from study.harness.files import CHECKOUT, NOTEBOOK_FAILED
from study.harness.journal import Tail
from study.harness.machine import Machine, this_machine
from study.harness.overrides import parse_overrides
from study.harness.progress import View
from study.harness.spec import PROFILES, Section, SectionParameters
from study.report import figures
from study.results.sizing import Sizes, asked_of, share_s
from study.results.status import COMPLETE, FAILED, UNAVAILABLE, section_status
from study.results.store import DataError, Store, utc_now
from study.sections.registry import SECTIONS
from study.sections.registry import section as find_section
from study.sections.registry import table as find_table

POLL_S = 0.2
DEFAULT_PROFILE = "standard"
# Parameters that were given are obeyed, with a warning where they take so many times the section's share of the time.
FAR_LONGER = 3.0


@dataclass(frozen=True)
class Job:
    """One section to run, with the parameters given on the command line and those in force."""

    section: Section
    given: Mapping[str, Any]
    parameters: SectionParameters


def chosen_sections(
    only: list[str], profile: str, overrides: Mapping[str, Any], machine: Machine
) -> list[tuple[Section, dict[str, Any]]]:
    """The sections that would run, each with the overrides that it takes, refused before anything is measured.

    Raises ValueError naming a bad name or value and the valid ones, also of what cannot be in any size.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; the profiles are {', '.join(PROFILES)}")
    chosen = [SECTIONS[name] for name in SECTIONS if name in {find_section(wanted).name for wanted in only or SECTIONS}]
    known = sorted({name for entry in chosen for name in entry.parameters.model_fields})
    for name in overrides:
        if name not in known:
            raise ValueError(f"no chosen section has a parameter {name!r}; valid: {', '.join(known)}")
    result = []
    for entry in chosen:
        given = {name: value for name, value in overrides.items() if name in entry.parameters.model_fields}
        smallest = entry.profiles[profile][machine.kind][-1]
        asked_of(entry, entry.resolve(profile, machine, given, smallest), machine)
        result.append((entry, given))
    return result


def prepare(chosen: list[tuple[Section, dict[str, Any]]], profile: str, sizes: Sizes) -> list[Job]:
    """What would run, with types and sizes for this machine, whose rates are measured if they are not known yet."""
    if not sizes.known:
        print("Measuring what this machine does, once: some ten seconds", flush=True)
    jobs = []
    for entry, given in chosen:
        parameters = sizes.resolve(entry, profile, given)
        asked_of(entry, parameters, sizes.machine)  # refuses points that cannot be
        jobs.append(Job(entry, given, parameters))
    return jobs


def run(only: list[str], profile: str, assignments: list[str], machine_name: str, force: bool) -> int:
    """Run what is not fresh, write the report; returns the exit status, non-zero if a section or the report failed.

    A section that fails costs only itself: the others go on, those that need it where its tables are there.
    """
    store, machine = Store(), this_machine()
    folder = store.folder_for(machine, machine_name)
    chosen = chosen_sections(only, profile, parse_overrides(assignments), machine)
    failed: dict[str, str] = {}
    with store.at_work(folder) as tell:
        sizes = Sizes(store, folder, machine)
        jobs = prepare(chosen, profile, sizes)
        print(f"Machine {folder}, profile {profile}: {', '.join(job.section.name for job in jobs)}", flush=True)
        tell_forecast(sizes, jobs, profile, force)
        for job in jobs:
            name = job.section.name
            if force:
                store.forget_damaged(folder, name)
            status = section_status(store, folder, job.section, machine, job.parameters)
            error = lacking(store, folder, job.section, failed)
            if not error and status.settled and not force and figures_exist(store, folder, job.section, status.state):
                print(f"{name}: {status.state}, nothing to measure {status.detail}".rstrip(), flush=True)
                continue
            if not error:
                tell(name)
                error = run_section(store, folder, job, profile, force)
                tell("")
            if error:
                failed[name] = error
                record_failure(store, folder, job, profile, error)
                print(f"{name}: FAILED: {error}", file=sys.stderr, flush=True)
        problems = write_report(store)
    if failed:
        again = [job for job in jobs if job.section.name in failed]
        print(f"Failed: {', '.join(failed)}; what was measured is kept.", file=sys.stderr)
        for name, error in failed.items():
            print(f"  {name}: {error.splitlines()[0]}", file=sys.stderr)
        print(f"To go on: {command_for(again, profile, assignments, machine_name, force)}", file=sys.stderr)
    elif problems:
        print("Every section is done, the report is not whole; again: ./run_all.sh --report-only", file=sys.stderr)
    return 1 if failed or problems else 0


def lacking(store: Store, folder: str, section: Section, failed: Mapping[str, str]) -> str | None:
    """Why a section cannot be tried: a table that it computes from is not there, the section that fills it failed."""
    for table in (table for derived in section.derived for table in derived.inputs):
        owner = find_table(table)[0].name
        if owner in failed and owner != section.name and not (store.data / folder / f"{table}.csv").exists():
            return f"not run: it needs {table} of section {owner}, which failed"
    return None


def command_for(jobs: list[Job], profile: str, assignments: list[str], machine_name: str, force: bool) -> str:
    """The command that runs these sections as they were asked for."""
    words = ["./run_all.sh", "--only", ",".join(job.section.name for job in jobs)]
    words += ["--profile", profile] if profile != DEFAULT_PROFILE else []
    words += ["--machine", machine_name] if machine_name != "auto" else []
    words += ["--force"] if force else []
    for assignment in assignments:
        if any(assignment.partition("=")[0] in job.given for job in jobs):
            words += ["-p", assignment]
    return shlex.join(words)


def tell_forecast(sizes: Sizes, jobs: list[Job], profile: str, force: bool) -> None:
    """What measuring will take, section by section; a warning where parameters that were given ask for far more."""
    forecasts = dict.fromkeys((job.section.name for job in jobs), 0.0)
    for job in jobs:
        # What a damaged table costs is its own section's affair, at its turn.
        with contextlib.suppress(DataError):
            forecasts[job.section.name] = sizes.forecast_s(job.section, job.parameters, force)
    told = [f"{name} {seconds / 60:.1f}" for name, seconds in forecasts.items() if seconds]
    if told:
        rates = sizes.rates
        measured = ", ".join(f"{name} {flops / 1e9:.3g}" for name, flops in rates.flops.items())
        print(f"Sizes for matmuls in {rates.dtype} ({measured} GFLOP/s a rank)")
        print(f"Forecast in minutes: {', '.join(told)}; {sum(forecasts.values()) / 60:.1f} in all", flush=True)
    for job in jobs:
        seconds, share = forecasts[job.section.name], share_s(job.section, profile, sizes.machine.kind)
        if job.given and seconds > FAR_LONGER * share:
            print(
                f"warning: {job.section.name} with {', '.join(job.given)} as given is forecast to take "
                f"{seconds / 60:.0f} minutes, where profile {profile} means {share / 60:.1f}",
                file=sys.stderr,
            )


def figures_exist(store: Store, folder: str, section: Section, state: str) -> bool:
    names = figures.of_section(section.name)
    paths = [store.figures / folder / f"{name}.{suffix}" for name in names for suffix in FORMATS]
    return state == "unavailable" or all(path.exists() for path in paths)


def run_section(store: Store, folder: str, job: Job, profile: str, force: bool) -> str | None:
    """Execute the notebook in a supervised child; returns what went wrong, or None when its verdict is good."""
    begin, run_id = time.monotonic(), secrets.token_hex(8)
    journal = store.journal_folder(folder)
    events, output = journal / f"{job.section.name}.run.events", journal / job.section.notebook
    events.unlink(missing_ok=True)
    parameters = {"profile": profile, "machine": folder, **job.given}
    command = [
        sys.executable,
        "-m",
        "study.harness.supervise",
        sys.executable,
        "-m",
        "study.commands.execute",
        os.path.join("notebooks", job.section.notebook),
        str(output),
        json.dumps(parameters),
    ]
    environment = {
        **child_environment_for_kernel(store),
        "MACO_RUN_ID": run_id,
        "MACO_EVENTS": str(events),
        "MACO_FORCE": "1" if force else "0",
    }
    print(f"{job.section.name}: {job.section.title}", flush=True)
    log = journal / f"{job.section.name}.run.log"
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=CHECKOUT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            view, tail, ended = View(), Tail(events), False
            while not ended:
                ended = process.poll() is not None
                for event in tail.new():
                    view.show(event)
                time.sleep(POLL_S)
        finally:
            process.stdin.close()
            process.wait()
    error = judge(store, folder, job.section, run_id, process.returncode, log)
    if error:
        return f"{error} (executed so far: {os.path.relpath(output, store.root)})"
    executed = store.data / folder / "executed"
    executed.mkdir(exist_ok=True)
    os.replace(output, executed / job.section.notebook)
    for path in (events, log):
        path.unlink(missing_ok=True)
    state = store.record(folder, job.section.name)["verdict"]["state"]
    print(f"{job.section.name}: {state} in {time.monotonic() - begin:.0f} s", flush=True)
    return None


def child_environment_for_kernel(store: Store) -> dict[str, str]:
    """The notebook's kernel sees this package and this study root; threads are the launcher's business."""
    path = os.pathsep.join(part for part in (str(CHECKOUT), os.environ.get("PYTHONPATH")) if part)
    given = {"PYTHONPATH": path, "PYTHONUTF8": "1", "MACO_ROOT": str(store.root)}
    return {**os.environ, **given, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


def judge(store: Store, folder: str, section: Section, run_id: str, status: int, log: pathlib.Path) -> str | None:
    """Our own verdict: the last cell of this very run wrote its completion record, and the process ended well."""
    if status != 0:
        text = log.read_text(encoding="utf-8", errors="replace")
        _, failed, error = text.rpartition(f"{NOTEBOOK_FAILED}\n")
        if failed:
            return error.strip()
        lines = [line for line in text.splitlines() if line.strip() and "[IPKernelApp]" not in line]
        return "\n".join(lines[-30:]) or f"its process ended with status {status}"
    verdict = store.record(folder, section.name).get("verdict", {})
    if verdict.get("run") != run_id or verdict.get("state") not in (COMPLETE, UNAVAILABLE):
        return "its notebook ended without reaching its completion record"
    return None


def record_failure(store: Store, folder: str, job: Job, profile: str, error: str) -> None:
    """Note the failed attempt beside the stored data, which stays as it was."""
    try:
        record = store.record(folder, job.section.name)
    except DataError as damaged:
        print(f"{job.section.name}: {damaged}; it is written anew", file=sys.stderr)
        record = {}
    record.update(
        profile=profile,
        parameters=job.parameters.model_dump(),
        verdict={"state": FAILED, "error": error, "at": utc_now(), "seconds": 0.0, "run": "runner"},
    )
    store.claim(this_machine(), folder)
    store.write_record(folder, job.section.name, record)
