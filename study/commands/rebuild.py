"""Figures and report from what is stored: all of it, or of some sections and one machine; nothing is measured."""

import sys

from study.harness.machine import num_cores
from study.report import figures, publish, report
from study.results.status import COMPLETE
from study.results.store import DataError, Store
from study.sections.registry import SECTIONS
from study.sections.registry import section as find_section


def write_report(store: Store) -> list[str]:
    """REPORT.md, HTML and PDF; prints and returns what could not be written."""
    try:
        problems = report.build(store.root, redraw=False)
        if not publish.is_current(store.root):
            publish.build(store.root)
    except (DataError, ValueError, RuntimeError) as error:
        problems = [f"{type(error).__name__}: {error}"]
    for problem in problems:
        print(f"report: {problem}", file=sys.stderr)
    return problems


def report_only(store: Store, only: list[str], machine_name: str) -> list[str]:
    """Draw the figures of the sections `only` (none: of all) on one stored machine ("auto": on all), then the report.

    Returns what could not be drawn or written; raises ValueError naming an unknown section or machine.
    """
    stored = store.machines()
    if machine_name != "auto" and machine_name not in stored:
        raise ValueError(f"unknown machine {machine_name!r}; data/ holds {', '.join(stored)}; auto: every one")
    chosen = [find_section(name) for name in only or SECTIONS]
    print(f"Drawing figures and report from {store.data}", flush=True)
    if not only and machine_name == "auto":
        problems = report.build(store.root, processes=num_cores())
    else:
        problems = []
        for folder in stored if machine_name == "auto" else [machine_name]:
            for entry in chosen:
                if store.record(folder, entry.name).get("verdict", {}).get("state") != COMPLETE:
                    continue
                for name in figures.of_section(entry.name):
                    try:
                        figures.write(store, folder, name)
                    except DataError as error:
                        problems.append(str(error))
        problems += report.build(store.root, redraw=False)
    for path in [store.root / "REPORT.md", *publish.build(store.root)]:
        print(path, flush=True)
    return list(dict.fromkeys(problems))
