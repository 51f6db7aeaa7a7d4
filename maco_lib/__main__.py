"""The library's command line: `python -m maco_lib doctor`. What measures and reports is the study's, in a checkout."""

import argparse
import sys

from maco_lib.doctor import doctor, tell

OF_THE_STUDY = ("run", "status", "report", "rederive", "advise", "export-plans", "migrate")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m maco_lib", description="What the library finds on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    checks = commands.add_parser("doctor", help="what is missing on this machine and how to get it")
    checks.add_argument("--problems", action="store_true", help="show only what is missing or weak")
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in OF_THE_STUDY:
        parser.error(f"{arguments[0]} is a command of the study: python -m study {' '.join(arguments)}, in a checkout")
    return tell(doctor(), parser.parse_args(arguments).problems)


if __name__ == "__main__":
    sys.exit(main())
