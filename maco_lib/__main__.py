"""The command line: `python -m maco_lib run`, `status`, `report` and others (`--help`)."""

import argparse
import sys

from maco_lib.study import advise, doctor, export_plans, migrate
from maco_lib.study.files import DataError


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", default="standard", help="smoke, standard or full (default: %(default)s)")
    parser.add_argument("--only", default="", help="sections to run, separated by commas (default: all)")
    parser.add_argument("--machine", default="auto", help="folder in data/ to measure in (default: this host's own)")
    parser.add_argument("--force", action="store_true", help="measure again what is already stored")
    parser.add_argument("--keep-going", action="store_true", help="go on with other sections when one fails")
    parser.add_argument(
        "-p",
        dest="overrides",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="set a section parameter, for example -p matmul_sizes=[1024,2048]; may be repeated",
    )


def run_main(options: argparse.Namespace) -> int:
    from maco_lib.study.runner import parse_overrides, run

    only = [name for name in options.only.split(",") if name]
    return run(
        only, options.profile, parse_overrides(options.overrides), options.machine, options.force, options.keep_going
    )


def status_main(options: argparse.Namespace) -> int:
    """One line for each section of this host's folder; status 1 if one is failed or interrupted."""
    from maco_lib.machine import this_machine
    from maco_lib.study.sections import SECTIONS
    from maco_lib.study.status import section_status
    from maco_lib.study.store import Store

    store, machine = Store(), this_machine()
    folder = store.folder_for(machine, options.machine)
    states = []
    print(f"data/{folder}")
    for section in SECTIONS.values():
        status = section_status(store, folder, section, machine)
        states.append(status.state)
        print(f"  {section.name:<18} {status.state:<12} {status.detail}".rstrip())
    return 1 if {"failed", "interrupted"} & set(states) else 0


def report_main(options: argparse.Namespace) -> int:
    from maco_lib.study import publish, report
    from maco_lib.study.store import Store

    store = Store()
    problems = report.build(store.root)
    publish.build(store.root)
    for problem in problems:
        print(f"report: {problem}", file=sys.stderr)
    return 1 if problems else 0


def rederive_main(options: argparse.Namespace) -> int:
    from maco_lib.study.derive import rederive
    from maco_lib.study.store import Store

    store = Store()
    machines = store.machines()
    if options.machine and options.machine not in machines:
        raise ValueError(f"unknown machine {options.machine!r}; data/ holds {', '.join(machines) or 'none'}")
    for folder in [options.machine] if options.machine else machines:
        print(f"data/{folder}: {', '.join(rederive(store, folder))}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m maco_lib", description="Measure and report communication overlap.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure what is missing or stale, then write figures and report")
    add_run_arguments(run)
    run.set_defaults(main=run_main)
    status = commands.add_parser("status", help="what is fresh, stale, failed or missing on this machine")
    status.add_argument("--machine", default="auto", help="folder in data/ (default: this host's own)")
    status.set_defaults(main=status_main)
    report = commands.add_parser("report", help="rebuild every figure and the report from stored data")
    report.set_defaults(main=report_main)
    rederive = commands.add_parser("rederive", help="recompute reported and derived tables from the stored launches")
    rederive.add_argument("--machine", default="", help="folder in data/ (default: every one)")
    rederive.set_defaults(main=rederive_main)
    for name, module, text in (
        ("doctor", doctor, "what is missing on this machine and how to get it"),
        ("advise", advise, "whether overlap pays for given shapes"),
        ("export-plans", export_plans, "write the tables of plans that the library ships, from stored data"),
        ("migrate", migrate, "give stored tables the names that the code has now"),
    ):
        command = commands.add_parser(name, help=text)
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    options = parser.parse_args(arguments)
    try:
        return options.main(options)
    except (ValueError, DataError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished points are kept, the next run goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
