"""The command line: `python -m study run`, `status`, `report` and others (`--help`)."""

import argparse
import os
import signal
import sys

from study.commands import advise, doctor, export_plans, migrate
from study.harness.files import DataError


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", help="smoke, standard or full (default: standard)")
    parser.add_argument("--only", default="", help="sections to run, separated by commas (default: all)")
    parser.add_argument("--machine", default="auto", help="folder in data/ to measure in (default: this host's own)")
    parser.add_argument("--force", action="store_true", help="measure again what is already stored")
    parser.add_argument("--keep-going", action="store_true", help="the default: a section that fails costs only itself")
    parser.add_argument(
        "--report-only",
        action="store_true",
        help="measure nothing: figures and report from the stored data, with --only and --machine those figures alone",
    )
    parser.add_argument(
        "-p",
        dest="overrides",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="set a section parameter, for example -p matmul_sizes=[1024,2048]; may be repeated",
    )


def run_main(options: argparse.Namespace) -> int:
    from study.commands.runner import DEFAULT_PROFILE, run

    only = [name for name in options.only.split(",") if name]
    if options.report_only:
        return report_only_main(options, only)
    return run(only, options.profile or DEFAULT_PROFILE, options.overrides, options.machine, options.force)


def report_only_main(options: argparse.Namespace, only: list[str]) -> int:
    from study.commands.rebuild import report_only
    from study.results.store import Store

    given = {"--profile": options.profile, "--force": options.force, "-p": options.overrides}
    if idle := [name for name, value in given.items() if value]:
        raise ValueError(f"--report-only measures nothing, so {idle[0]} means nothing; it takes --only and --machine")
    return tell(report_only(Store(), only, options.machine))


def tell(problems: list[str]) -> int:
    """Print what the report lacks; returns the exit status."""
    for problem in problems:
        print(f"report: {problem}", file=sys.stderr)
    return 1 if problems else 0


def status_main(options: argparse.Namespace) -> int:
    """One line for each section of this host's folder, or a stored one; status 1 if one is failed or interrupted."""
    from study.harness.machine import this_machine
    from study.results.status import section_status
    from study.results.store import Store
    from study.sections.registry import SECTIONS

    store, machine = Store(), this_machine()
    if options.machine in store.machines():
        folder, machine = options.machine, store.measured_machine(options.machine)
    else:
        folder = store.folder_for(machine, options.machine)
    states = []
    print(f"data/{folder}")
    for section in SECTIONS.values():
        status = section_status(store, folder, section, machine)
        states.append(status.state)
        print(f"  {section.name:<18} {status.state:<12} {status.detail}".rstrip())
    return 1 if {"failed", "interrupted"} & set(states) else 0


def report_main(options: argparse.Namespace) -> int:
    from study.commands.rebuild import report_only
    from study.results.store import Store

    return tell(report_only(Store(), [], "auto"))


def rederive_main(options: argparse.Namespace) -> int:
    from study.commands.derive import rederive
    from study.results.store import Store

    store = Store()
    machines = store.machines()
    if options.machine and options.machine not in machines:
        raise ValueError(f"unknown machine {options.machine!r}; data/ holds {', '.join(machines) or 'none'}")
    for folder in [options.machine] if options.machine else machines:
        print(f"data/{folder}: {', '.join(rederive(store, folder))}")
    return 0


def hint(extra: list[str]) -> str:
    """What is probably meant by arguments that `run` does not know."""
    from study.harness.spec import PROFILES
    from study.sections.registry import SECTIONS

    names = [name for word in extra for name in word.split(",") if name]
    if all(name in SECTIONS for name in names):
        return f"; did you mean --only {','.join(names)}?"
    if len(names) == 1 and names[0] in PROFILES:
        return f"; did you mean --profile {names[0]}?"
    return f"; sections are named by --only: {', '.join(SECTIONS)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m study", description="Measure and report communication overlap.")
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
    options, extra = parser.parse_known_args(arguments)
    if extra:
        parser.error(f"unknown argument {' '.join(extra)}" + (hint(extra) if options.command == "run" else ""))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without some letters gets question marks
    try:
        status = options.main(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Who read our output has enough (`| head`); Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except (ValueError, DataError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished points are kept, the next run goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
