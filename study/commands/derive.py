"""What is a function of stored data: reported rows from per-launch rows, and derived tables from reported ones.

    python -m study rederive [--machine NAME]

computes both anew for stored machines, after their formulas changed; nothing is measured, and a table that comes out
equal to the stored one, to the digits that can be known, is left as it is. Where a machine was taken
away in the middle of a run, its finished points come into the tables, whose section stays "interrupted", and a section
that only computes is computed.
"""

from study.harness.spec import Derived, Section, SectionParameters
from study.results.launch import plan
from study.results.status import COMPLETE, input_digest, recorded_parameters
from study.results.store import Store, utc_now
from study.sections import registry as sections


def compute(store: Store, folder: str, derived: Derived, parameters: SectionParameters) -> None:
    """Write a derived table from its inputs, if it says anything else than the stored one; raises DataError when an
    input is missing or damaged."""
    tables = {table: store.read(folder, table) for table in derived.inputs}
    facts = {"inputs_sha256": input_digest(store, folder, derived, parameters)}
    rows = derived.compute(tables, parameters)
    if not store.stands(folder, derived, rows, facts):
        store.write_table(folder, derived, rows, facts)


def rederive(store: Store, folder: str) -> list[str]:
    """Compute every stored table of data/<folder>/ anew from its launches or inputs; returns their names."""
    done, machine = [], store.measured_machine(folder)
    for section in sections.SECTIONS.values():
        record = store.record(folder, section.name)
        for dataset in section.datasets if record else ():
            stored = record.get("tables", {}).get(dataset.name, {})
            if store.journal(folder, dataset.name).exists():
                points = plan(dataset, recorded_parameters(section, record), machine)
                keys = [dataset.key(point) for point in points]
            elif stored.get("method_version") == dataset.method_version:
                keys = stored["keys"]
            else:
                continue
            store.merge_journal(folder, dataset, keys)
            done.append(dataset.name)
        if section.datasets or record:
            computed = [derived for derived in section.derived if derived.name in record.get("tables", {})]
            for derived in computed:
                compute(store, folder, derived, recorded_parameters(section, record))
            done += [derived.name for derived in computed]
        else:
            done += compute_section(store, folder, section)
    return done


def compute_section(store: Store, folder: str, section: Section) -> list[str]:
    """Compute a section that measures nothing and was never run there; the names of its tables.

    With the parameters of the profile that the sections it needs were run with; none where these are not complete.
    """
    needed = [store.record(folder, name) for name in section.needs]
    if not all(record.get("verdict", {}).get("state") == COMPLETE for record in needed):
        return []
    profile = needed[0]["profile"]
    parameters = section.resolve(profile, store.measured_machine(folder))
    for derived in section.derived:
        compute(store, folder, derived, parameters)
    verdict = {"state": COMPLETE, "error": "", "at": utc_now(), "seconds": 0.0, "run": "rederive"}
    record = store.record(folder, section.name)
    record.update(profile=profile, parameters=parameters.model_dump(), verdict=verdict)
    store.write_record(folder, section.name, record)
    return [derived.name for derived in section.derived]
