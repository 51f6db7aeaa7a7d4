"""The store: what was measured, per machine folder, as tables that say how they came about.

For each table `data/<machine>/` holds `<table>.csv` (the reported rows, one per point and arm), `<table>.launches.csv`
(the same per process launch: what the reported rows are aggregated from), `<table>.parquet` (raw samples), and for each
section `<section>.json` (parameters, verdict, provenance of every launch, checksums of the files).
"""

import contextlib
import datetime
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd

from study.harness import locks
from study.harness.files import CHECKOUT, DataError, sha256, study_root, write_atomically, write_json
from study.harness.journal import read_lines
from study.harness.machine import Machine
from study.harness.provenance import source_digest
from study.harness.rows import aggregate, agree, as_csv, journal_frames, replacing
from study.harness.spec import Dataset, Derived, check_rows
from study.sections import registry as sections

TABLE_SUFFIXES = (".csv", ".launches.csv", ".parquet")


def utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Store:
    """The data folder below `root` (default: `study_root()`)."""

    def __init__(self, root: pathlib.Path | None = None):
        self.root = pathlib.Path(root) if root is not None else study_root()
        self.data = self.root / "data"
        self.figures = self.root / "figures"

    # -- machine folders ---------------------------------------------------------------------------------------------

    def machines(self) -> list[str]:
        """Names of the folders that hold measurements, in alphabetical order."""
        return sorted(path.parent.name for path in self.data.glob("*/machine.json"))

    def machine(self, name: str) -> dict[str, Any]:
        """What `data/<name>/machine.json` says: kind, name of the hardware, identities, description."""
        return self._read_json(self.data / name / "machine.json")

    def measured_machine(self, name: str) -> Machine:
        """The machine that data/<name>/ was measured on, without its identity."""
        entry = self.machine(name)
        description = entry["description"]
        memory = description.get("gpu_memory_bytes") or description["ram_bytes"]
        return Machine(entry["kind"], entry["num_devices"], entry["hardware"], "", memory, description)

    def folder_for(self, machine: Machine, wanted: str = "auto") -> str:
        """The folder name in which `machine` may measure; raises ValueError naming the valid ones.

        "auto" is the folder of this very host, else the first free name: a folder measured by another host of the same
        hardware is left alone unless `wanted` names it.
        """
        taken = {name: self.machine(name) for name in self.machines()}
        same_hardware = [name for name, entry in taken.items() if entry["hardware"] == machine.name]
        own = [name for name in same_hardware if machine.identity in taken[name]["identities"]]
        candidates = [machine.name, *(f"{machine.name}-{letter}" for letter in "bcdefghijklmnopqrstuvwxyz")]
        automatic = own[0] if own else next((name for name in candidates if name not in taken), None)
        if wanted == "auto":
            if automatic is None:
                raise ValueError(
                    f"every name from {candidates[0]} to {candidates[-1]} is taken; name one with --machine"
                )
            return automatic
        valid = sorted({*same_hardware, *([automatic] if automatic else [])})
        if wanted not in valid:
            others = [name for name in taken if name not in valid]
            raise ValueError(
                f"machine {wanted!r} is not one this host ({machine.name}) can measure in; "
                f"valid: auto, {', '.join(valid)}"
                + (f"; stored, to look at in notebooks and with status: {', '.join(others)}" if others else "")
            )
        return wanted

    def claim(self, machine: Machine, name: str) -> None:
        """Record that `machine` measures in `data/<name>/`."""
        path = self.data / name / "machine.json"
        entry = self._read_json(path) if path.exists() else {"identities": []}
        identities = entry["identities"]
        if machine.identity not in identities:
            entry = {
                "name": name,
                "hardware": machine.name,
                "kind": machine.kind,
                "num_devices": machine.num_devices,
                "identities": [*identities, machine.identity],
                "description": machine.description,
            }
            write_json(path, entry)

    # -- reading -----------------------------------------------------------------------------------------------------

    def record(self, name: str, section: str) -> dict[str, Any]:
        """`data/<name>/<section>.json`, or {} if the section was never run there."""
        path = self.data / name / f"{section}.json"
        return self._read_json(path) if path.exists() else {}

    def read(self, name: str, table: str) -> pd.DataFrame:
        """The reported table; raises DataError naming the file if it is missing, changed, or breaks its schema."""
        _, entry = sections.table(table)
        rows = self._parse(name, table, f"{table}.csv")
        try:
            return check_rows(entry, rows, f"data/{name}/{table}.csv")
        except ValueError as error:
            raise DataError(str(error)) from None

    def launches(self, name: str, table: str) -> pd.DataFrame:
        """The same rows per process launch, without the columns that `Dataset.finish` adds."""
        return self._parse(name, table, f"{table}.launches.csv")

    def samples(self, name: str, table: str) -> pd.DataFrame:
        """Raw samples: point_key, repeat, launch, the labels, quantity, rank, iteration, value."""
        path = self._checked(name, table, f"{table}.parquet")
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{self._shown(path)} cannot be read: {error}") from None

    def checksum(self, name: str, table: str) -> str:
        """SHA-256 of the reported table, once it is known to be the one that was written."""
        return sha256(self._checked(name, table, f"{table}.csv"))

    def _parse(self, name: str, table: str, filename: str) -> pd.DataFrame:
        _, entry = sections.table(table)
        path = self._checked(name, table, filename)
        try:
            rows = pd.read_csv(path)
        except ValueError as error:
            raise DataError(f"{self._shown(path)} cannot be read: {error}") from None
        texts = [column for column, kind in entry.schema.columns.items() if "str" in str(kind.dtype) and column in rows]
        return rows.assign(
            **{
                column: rows[column].astype("string").fillna("").astype(str)
                for column in [*texts, "error"]
                if column in rows
            }
        )

    def _checked(self, name: str, table: str, filename: str) -> pathlib.Path:
        """The file's path, once it is known to be the one that was written."""
        section, _ = sections.table(table)
        path = self.data / name / filename
        hint = f"measure it with: python -m study run --only {section.name}"
        if not path.exists():
            raise DataError(f"{self._shown(path)} is missing; {hint}")
        record = self.record(name, section.name)
        recorded = {record.get(part, {}).get(filename) for part in ("files", "replacing")} - {None}
        if not recorded:
            raise DataError(f"{self._shown(path)} has no checksum in {section.name}.json; {hint} --force")
        if sha256(path) not in recorded:
            raise DataError(
                f"{self._shown(path)} was changed after it was written (its SHA-256 is not the recorded one); "
                f"restore it, or {hint} --force"
            )
        return path

    def _read_json(self, path: pathlib.Path) -> dict[str, Any]:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{self._shown(path)} cannot be read: {error}") from None

    def _shown(self, path: pathlib.Path) -> str:
        return os.path.relpath(path, self.root)

    # -- the journal of a running measurement ------------------------------------------------------------------------

    def journal_folder(self, name: str) -> pathlib.Path:
        """Made on first use; raises DataError, naming it, where it cannot be."""
        folder = self.data / name / ".journal"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{folder} cannot be made: {error.strerror}; MACO_ROOT may name a folder elsewhere"
            ) from None
        return folder

    def at_work(self, name: str) -> contextlib.AbstractContextManager[Callable[[str], None]]:
        """Only one run at a time works on a machine's folder; it tells which section it is at. See `locks.held`."""
        busy = f"another run is at work in data/{name}; wait for it or stop it"
        return locks.held(self.journal_folder(name) / "run.lock", busy)

    def running(self, name: str) -> str | None:
        """The section that a living run is at, "" between two of them, None where no run is at work."""
        return locks.holder(self.data / name / ".journal" / "run.lock")

    def journal(self, name: str, table: str) -> pathlib.Path:
        return self.journal_folder(name) / f"{table}.jsonl"

    def measured(self, name: str, table: str) -> set[tuple[str, int]]:
        """(point key, repeat) of every finished measurement, stored or still in the journal."""
        done = {(line["key"], line["repeat"]) for line in read_lines(self.journal(name, table))}
        if (self.data / name / f"{table}.launches.csv").exists():
            rows = self.launches(name, table)
            done |= set(zip(rows["point_key"], rows["repeat"], strict=True))
        return done

    # -- writing -----------------------------------------------------------------------------------------------------

    def forget_damaged(self, name: str, section: str) -> None:
        """Remove the section's files that can no longer be trusted, so that a forced run can write them anew."""
        folder, tables = self.data / name, sections.section(section).tables
        try:
            self.record(name, section)
        except DataError:
            (folder / f"{section}.json").unlink()
        for table in tables:
            present = [path for path in (folder / f"{table}{suffix}" for suffix in TABLE_SUFFIXES) if path.exists()]
            try:
                for path in present:
                    self._checked(name, table, path.name)
            except DataError:
                for path in present:
                    path.unlink()

    def merge_journal(self, name: str, dataset: Dataset, keys: list[str]) -> None:
        """Fold the journal into the stored table and report the points `keys`; the newest launch of a repeat counts.

        Rows of points outside `keys` stay in `<table>.launches.csv`, so that going back to earlier parameters measures
        nothing; rows of an older method version are dropped.
        """
        lines = list(read_lines(self.journal(name, dataset.name)))
        new_rows, new_samples = journal_frames(lines, dataset)
        folder = self.data / name
        replaced = {(line["key"], line["repeat"]) for line in lines}
        all_rows, all_samples = new_rows, new_samples
        if (folder / f"{dataset.name}.launches.csv").exists():
            all_rows = replacing(self.launches(name, dataset.name), replaced, new_rows)
        if (folder / f"{dataset.name}.parquet").exists():
            all_samples = replacing(self.samples(name, dataset.name), replaced, new_samples)
        all_rows = all_rows[all_rows["method_version"] == dataset.method_version]
        if len(all_samples):
            all_samples = all_samples[all_samples["launch"].isin(all_rows["launch"])]
        order = {key: position for position, key in enumerate(keys)}
        reported = all_rows[all_rows["point_key"].isin(order)]
        reported = reported.sort_values("point_key", key=lambda column: column.map(order), kind="stable")
        reported = dataset.finish(aggregate(reported, dataset.index))
        if not lines and self.stands(name, dataset, reported, {"keys": keys}, all_rows):
            return
        self.write_table(name, dataset, reported, {"keys": keys}, all_rows, all_samples, lines)

    def stands(
        self,
        name: str,
        table: Dataset | Derived,
        reported: pd.DataFrame,
        facts: dict[str, Any],
        launches: pd.DataFrame | None = None,
    ) -> bool:
        """Whether the stored table already says what `write_table` would write, to the digits that can be known."""
        section, _ = sections.table(table.name)
        recorded = self.record(name, section.name).get("tables", {}).get(table.name, {})
        expected = {"method_version": table.method_version, "num_rows": len(reported), **facts}
        if any(recorded.get(fact) != value for fact, value in expected.items()):
            return False
        try:
            stored = self._checked(name, table.name, f"{table.name}.csv")
            by_launch = self._checked(name, table.name, f"{table.name}.launches.csv") if launches is not None else None
        except DataError:
            return False
        if by_launch and by_launch.read_bytes() != as_csv(launches):
            return False
        return agree(pd.read_csv(stored), pd.read_csv(io.BytesIO(as_csv(reported))))

    def write_table(
        self,
        name: str,
        table: Dataset | Derived,
        reported: pd.DataFrame,
        facts: dict[str, Any],
        launches: pd.DataFrame | None = None,
        samples: pd.DataFrame | None = None,
        lines: Iterable[dict] = (),
    ) -> None:
        """Validate and write one table's files and its part of the section's record."""
        section, _ = sections.table(table.name)
        check_rows(table, reported, f"{table.name}.csv, not written")
        contents = {f"{table.name}.csv": as_csv(reported)}
        if launches is not None:
            contents[f"{table.name}.launches.csv"] = as_csv(launches)
        if samples is not None and len(samples):
            buffer = io.BytesIO()
            samples.to_parquet(buffer, index=False, compression="zstd")
            contents[f"{table.name}.parquet"] = buffer.getvalue()
        folder = self.data / name
        record = self.record(name, section.name)
        files = record.setdefault("files", {})
        record["replacing"] = {filename: files[filename] for filename in contents if filename in files}
        files.update({filename: hashlib.sha256(content).hexdigest() for filename, content in contents.items()})
        record.setdefault("tables", {})[table.name] = {
            "method_version": table.method_version,
            "written": utc_now(),
            "num_rows": len(reported),
            "source_sha256": source_digest(CHECKOUT),
            **facts,
        }
        started = record.setdefault("launches", {})
        for launch in {line["launch"] for line in lines}:
            started[launch] = self._read_json(self.journal_folder(name) / f"{launch}.json")
        if launches is not None:
            used = set(launches["launch"])
            record["launches"] = {
                launch: facts for launch, facts in started.items() if launch in used or facts.get("table") != table.name
            }
        # A kill between these steps leaves every file either as it was or as recorded, and the journal to merge again.
        self.write_record(name, section.name, record)
        for filename, content in contents.items():
            write_atomically(folder / filename, content)
        del record["replacing"]
        self.write_record(name, section.name, record)
        self.journal(name, table.name).unlink(missing_ok=True)

    def write_record(self, name: str, section: str, record: dict[str, Any]) -> None:
        write_json(self.data / name / f"{section}.json", {"section": section, **record})
