"""`python -m study migrate`: give what stored tables hold the names that the code has for it now.

Nothing is measured or computed anew: cells of `RENAMED` are rewritten in a table and its launches, and their checksums.
A table that has the names already stays as it is, byte for byte.
"""

import argparse
import csv
import hashlib
import io
from collections.abc import Callable

from maco_lib.linear.plan import LinearPlan
from maco_lib.linear.techniques.persistent_time import ascii_tiling
from study.harness.files import DataError, write_atomically
from study.results.store import Store
from study.sections import registry as sections


def plan_name(text: str) -> str:
    """Of a plan in the words of before ("persistent, 2 × 128"): its name. "" and what is no plan stay."""
    try:
        return LinearPlan.parse(text).name if text else text
    except ValueError:
        return text


RENAMED: dict[str, dict[str, Callable[[str], str]]] = {
    "linear_all_reduce": {"plan": plan_name, "tiling": ascii_tiling},
}


def renamed(content: bytes, columns: dict[str, Callable[[str], str]], source: str) -> bytes:
    """A CSV with its cells renamed; raises DataError where it would not be written back as it was."""
    header, *rows = csv.reader(io.StringIO(content.decode(), newline=""))
    if as_csv([header, *rows]) != content:
        raise DataError(f"{source} is not written as tables are: left as it is")
    places = [(header.index(name), rename) for name, rename in columns.items() if name in header]
    for row in rows:
        for place, rename in places:
            row[place] = rename(row[place])
    return as_csv([header, *rows])


def as_csv(rows: list[list[str]]) -> bytes:
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue().encode()


def migrate(store: Store, name: str) -> list[str]:
    """Rename in the tables of data/<name>/; returns the files that were rewritten."""
    changed = []
    for table, columns in RENAMED.items():
        section, _ = sections.table(table)
        record = store.record(name, section.name)
        if table not in record.get("tables", {}):
            continue
        store.checksum(name, table)  # nothing is built on a damaged file
        contents = {}
        for filename in (f"{table}.csv", f"{table}.launches.csv"):
            old = (store.data / name / filename).read_bytes()
            new = renamed(old, columns, f"data/{name}/{filename}")
            if new != old:
                contents[filename] = new
        rewrite(store, name, section.name, record, contents)
        changed += contents
    return changed


def rewrite(store: Store, name: str, section: str, record: dict, contents: dict[str, bytes]) -> None:
    """Files and checksums, as `Store.write_table`: a kill in between leaves every file as it was or as recorded."""
    files = record["files"]
    record["replacing"] = {filename: files[filename] for filename in contents}
    files.update({filename: hashlib.sha256(content).hexdigest() for filename, content in contents.items()})
    store.write_record(name, section, record)
    for filename, content in contents.items():
        write_atomically(store.data / name / filename, content)
    del record["replacing"]
    store.write_record(name, section, record)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(main=main)


def main(options: argparse.Namespace) -> int:
    store = Store()
    for name in store.machines():
        print(f"data/{name}: {', '.join(migrate(store, name)) or 'nothing to rename'}")
    return 0
