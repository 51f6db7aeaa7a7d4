"""What a notebook of the study does: begin, measure what is missing, show tables and figures, complete.

    run = notebook.begin("overlap", profile="standard", machine="auto", num_ranks=None)
    run.measure()
    run.table("overlap")
    run.figure("overlap_published")
    run.complete()

The same calls serve JupyterLab and the runner. Where there is nothing to measure on, the stored results of a reference
machine are shown instead, and say so. Nothing is written for a machine whose stored results are only shown.
"""

import contextlib
import os
import time
from typing import Any

import pandas as pd
from IPython.display import HTML, Image, Markdown, display

from study.commands import derive
from study.drawing.style import FORMATS, RC
from study.harness.machine import Machine, this_machine
from study.harness.markdown import code, verbatim
from study.harness.spec import Derived, Section, SectionParameters
from study.harness.supervise import die_with_parent
from study.report import figures
from study.results import launch
from study.results.sizing import Sizes
from study.results.status import COMPLETE, RUNNING, UNAVAILABLE, recorded_parameters, section_status, stale_tables
from study.results.store import DataError, Store, utc_now
from study.sections.registry import section as find_section
from study.sections.registry import table as find_table

SCREEN_DPI = 110


def begin(section: str, profile: str = "standard", machine: str = "auto", **parameters: Any) -> "Run":
    """Open a section: validate the parameters (None: as the profile says), choose the machine folder, show both.

    `machine`: "auto" for this host's own folder, or the name of a folder in data/; what another host measured is shown
    and never measured again (`is_shown`). Raises ValueError naming an unknown section, profile, parameter, machine or a
    value of the wrong type, with the valid ones.
    """
    if os.environ.get("MACO_RUN_ID"):
        die_with_parent()
    pd.set_option("display.html.use_mathjax", False)  # a dollar in an error or a name is a dollar
    pd.set_option("display.max_colwidth", None)  # an error is read to its end
    pd.set_option("display.max_columns", None)  # no backend is left out
    pd.set_option("display.max_rows", 100)
    entry, store, here = find_section(section), Store(), this_machine()
    if machine in store.machines() and is_shown(store.machine(machine), here):
        entry.resolve(profile, store.measured_machine(machine), parameters)  # refuses what is wrong
        run, parameters = show(store, entry, here, machine), {}  # those that it was measured with are in force
    else:
        folder = store.folder_for(here, machine)
        sizes = Sizes(store, folder, here)
        run = Run(store, entry, here, folder, profile, sizes.resolve(entry, profile, parameters), sizes)
    run.show_parameters(parameters)
    return run


def is_shown(stored: dict[str, Any], here: Machine) -> bool:
    """Whether a machine folder, by its machine.json, is only shown here: another host's, even of equal hardware.

    To go on in it from here, the runner has to be told: `./run_all.sh --machine NAME`.
    """
    by_hand = not os.environ.get("MACO_RUN_ID")
    return stored["hardware"] != here.name or (by_hand and here.identity not in stored["identities"])


def show(store: Store, section: Section, here: Machine, folder: str) -> "Run":
    """A run that shows what is stored in `folder`, or of a reference machine where the section was never run there."""
    if not store.record(folder, section.name):
        lacking, folder = folder, reference_for(store, section.tables[0])
        if not folder:
            raise DataError(f"section {section.name} was never run on {lacking}, nor on any other machine in data/")
        display(Markdown(f"*This section was never run on {code(lacking)}; {code(folder)} is shown instead.*"))
    record = store.record(folder, section.name)
    try:
        parameters = recorded_parameters(section, record)
    except ValueError:  # the section takes others today; what is stored is shown, and that it is stale
        parameters = section.resolve(record["profile"], store.measured_machine(folder))
    return Run(store, section, here, folder, record["profile"], parameters)


def reference_for(store: Store, table: str) -> str | None:
    """The machine that has `table` and shows most: the one with most GPUs."""
    having = [name for name in store.machines() if (store.data / name / f"{table}.csv").exists()]
    return max(
        having,
        key=lambda name: (store.machine(name)["kind"] == "cuda", store.machine(name)["num_devices"]),
        default=None,
    )


def failures(rows: pd.DataFrame, *columns: str) -> pd.DataFrame | Markdown:
    """The rows of a reported table that failed their check, by `columns`, each with its error; or that none did."""
    failed = rows.loc[~rows["correct"], [*columns, "error"]]
    return failed if len(failed) else Markdown("*Every arm passed its check.*")


class Run:
    """One section being run on one machine; `begin` makes it."""

    def __init__(
        self,
        store: Store,
        section: Section,
        machine: Machine,
        folder: str,
        profile: str,
        parameters: SectionParameters,
        sizes: Sizes | None = None,
    ):
        self.store, self.section, self.machine, self.folder = store, section, machine, folder
        self.profile, self.parameters, self.sizes = profile, parameters, sizes
        self.forecast_s = 0.0
        self.reasons: dict[str, str] = {}
        self.shown: list[str] = []
        self.undrawn: list[str] = []
        self.caveats: dict[str, str] = {}
        self.begun = time.monotonic()

    @property
    def view_only(self) -> bool:
        """Whether stored results of another machine are shown: nothing can be measured for it here."""
        return self.sizes is None

    def show_parameters(self, given: dict[str, Any]) -> None:
        """The parameters in force, and where each came from."""
        rows = [
            (
                name,
                repr(value),
                "set here" if given.get(name) is not None else f"profile {self.profile}",
                type(self.parameters).model_fields[name].description or "",
            )
            for name, value in self.parameters.model_dump().items()
        ]
        shown = f"**{self.section.title}** on {code(self.folder)}"
        if self.view_only:
            shown += f" ({verbatim('; '.join(filter(None, ['stored results', self.caveat(self.folder)])))})"
        display(Markdown(shown))
        display(table_of(pd.DataFrame(rows, columns=["parameter", "value", "from", "meaning"])))

    def measure(self) -> None:
        """Measure what is missing of every table of the section, then compute the derived ones.

        A table this machine cannot measure is left out, with the reason. Raises LaunchError when a program fails.
        """
        if self.view_only:
            print(f"Nothing is measured: {self.folder} is another host's.")
            print("Its stored results are shown, measured with the parameters above.")
            print('machine = "auto" measures this host.')
            return
        # Under the runner the lock is the runner's.
        by_hand = not os.environ.get("MACO_RUN_ID")
        with self.store.at_work(self.folder) if by_hand else contextlib.nullcontext() as tell:
            if by_hand:
                tell(self.section.name)
            self.fill()

    def fill(self) -> None:
        """What `measure` does, once nobody else is at it."""
        self.store.claim(self.machine, self.folder)
        force = os.environ.get("MACO_FORCE") == "1"
        self.forecast_s = self.sizes.forecast_s(self.section, self.parameters, force)
        self.write_record(RUNNING)
        if self.forecast_s:
            print(f"Forecast: {self.forecast_s / 60:.1f} minutes of measuring.")
        for dataset in self.section.datasets:
            reason = dataset.unavailable(self.parameters, self.machine)
            if reason:
                self.reasons[dataset.name] = reason
                print(f"{dataset.name}: cannot be measured here: {reason}")
                continue
            begin = time.monotonic()
            count = launch.measure(
                self.store, self.folder, dataset, self.parameters, self.machine, self.sizes.rates, force
            )
            print(
                f"{dataset.name}: {count} points measured in {time.monotonic() - begin:.0f} s"
                if count
                else f"{dataset.name}: every point is already stored"
            )
        for derived in self.section.derived:
            self.compute(derived)

    def compute(self, derived: Derived) -> None:
        """Write a derived table from its inputs, or note why it cannot be."""
        for table in derived.inputs:
            owner = find_table(table)[0].name
            elsewhere = self.store.record(self.folder, owner).get("verdict", {}).get("state") == UNAVAILABLE
            if table in self.reasons or (owner != self.section.name and elsewhere):
                self.reasons[derived.name] = f"it needs {table}, which cannot be measured here"
                return
        derive.compute(self.store, self.folder, derived, self.parameters)

    def caveat(self, folder: str) -> str:
        """What is wrong with the section's stored results of a machine, "stale: ..."; "" with nothing wrong."""
        if folder not in self.caveats:
            status = section_status(self.store, folder, self.section, self.store.measured_machine(folder))
            self.caveats[folder] = "" if status.settled else f"{status.state}: {status.detail}"
        return self.caveats[folder]

    def source(self, table: str) -> str:
        """The machine folder that `table` is shown from: this one, or a reference where it cannot be measured here."""
        if self.view_only and not (self.store.data / self.folder / f"{table}.csv").exists():
            self.reasons.setdefault(table, f"{self.folder} was measured without it")
        if table not in self.reasons:
            return self.folder
        reference = reference_for(self.store, table)
        if not reference:
            raise DataError(
                f"{table} cannot be measured here ({self.reasons[table]}), and data/ holds no machine that has it"
            )
        told = verbatim("; ".join(filter(None, [self.reasons[table], self.caveat(reference)])))
        display(Markdown(f"*Stored results of the reference machine {code(reference)}: {told}.*"))
        return reference

    def table(self, name: str) -> pd.DataFrame:
        """The reported table, checked against its schema and checksum."""
        return self.store.read(self.source(name), name)

    def has(self, name: str) -> bool:
        """Whether the table is stored for this machine: the parameters may ask for none of its points."""
        return (self.store.data / self.folder / f"{name}.csv").exists()

    def figure(self, name: str) -> None:
        """Draw figures/<machine>/<name>.{svg,pdf,png,csv} and show it at its printed size, or say why it is not there.

        Of another machine the figure that is stored is shown, and where there is none one that is not kept.
        """
        specification = figures.figure_spec(name)
        self.shown.append(name)
        tables = [
            table for table in specification.tables if "." not in table
        ]  # the published study's are of no machine
        source = next((found for found in map(self.source, tables) if found != self.folder), self.folder)
        stored = self.store.figures / source / f"{name}.png"
        try:
            if not self.view_only and source == self.folder:
                figures.write(self.store, source, name)
                png = stored.read_bytes()
            else:
                png = stored.read_bytes() if stored.exists() else figures.render(self.store, source, name)["png"]
        except DataError as error:
            self.undrawn.append(str(error))
            display(Markdown(f"*{verbatim(error)}.*"))
            return
        width_px = int.from_bytes(png[16:20], "big")  # PNG's header chunk
        display(Image(data=png, embed=True, width=round(width_px / RC["savefig.dpi"] * SCREEN_DPI)))
        display(Markdown(f"*{specification.caption}*"))

    def complete(self) -> None:
        """The section's own verdict: every expected point stored, schemas pass, every figure of it drawn.

        The figures that the notebook has not shown are shown first.
        """
        for name in figures.of_section(self.section.name):
            if name not in self.shown:
                self.figure(name)
        if self.view_only:
            state = self.store.record(self.folder, self.section.name).get("verdict", {}).get("state", "missing")
            told = self.caveat(self.folder) or state
            print(f"Stored results: section {self.section.name} of {self.folder} is {told}.")
            return
        if self.reasons:
            # Without its main table a section has nothing of its own to report.
            lost = [name for name in self.section.tables if name in self.reasons]
            if lost:
                self.write_record(UNAVAILABLE, "; ".join(f"{name}: {self.reasons[name]}" for name in lost))
                print(f"Section {self.section.name} cannot be measured here.")
                return
        problems = stale_tables(
            self.store,
            self.folder,
            self.section,
            self.machine,
            self.parameters,
            self.store.record(self.folder, self.section.name),
        )
        problems += [
            f"figure {name}.{suffix} was not written"
            for name in figures.of_section(self.section.name)
            for suffix in FORMATS
            if not (self.store.figures / self.folder / f"{name}.{suffix}").exists()
        ]
        problems += self.undrawn
        if problems:
            raise RuntimeError(f"section {self.section.name} is not complete: " + "; ".join(problems))
        self.write_record(COMPLETE)
        print(f"Section {self.section.name} is complete.")

    def write_record(self, state: str, error: str = "") -> None:
        record = self.store.record(self.folder, self.section.name)
        record.update(
            profile=self.profile,
            parameters=self.parameters.model_dump(),
            verdict={
                "state": state,
                "error": error,
                "at": utc_now(),
                "seconds": round(time.monotonic() - self.begun, 1),
                "run": os.environ.get("MACO_RUN_ID", "by hand"),
            },
        )
        if self.forecast_s:  # of the last run that measured anything
            took_s = round(time.monotonic() - self.begun, 1)
            record["forecast"] = {"forecast_s": round(self.forecast_s, 1), "took_s": took_s}
        self.store.write_record(self.folder, self.section.name, record)


def table_of(rows: pd.DataFrame) -> HTML:
    return HTML(rows.to_html(index=False, border=0))
