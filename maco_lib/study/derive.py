"""What is a function of stored data: reported rows from per-launch rows, and derived tables from reported ones.

    python -m maco_lib rederive [--machine NAME]

computes both anew for stored machines, after their formulas changed; nothing is measured.
"""

from maco_lib.study import sections
from maco_lib.study.spec import Derived, SectionParameters
from maco_lib.study.status import input_digest, recorded_parameters
from maco_lib.study.store import Store


def compute(store: Store, folder: str, derived: Derived, parameters: SectionParameters) -> None:
    """Write a derived table from its inputs; raises DataError when one is missing or damaged."""
    tables = {table: store.read(folder, table) for table in derived.inputs}
    facts = {"inputs_sha256": input_digest(store, folder, derived, parameters)}
    store.write_table(folder, derived, derived.compute(tables, parameters), facts)


def rederive(store: Store, folder: str) -> list[str]:
    """Compute every stored table of data/<folder>/ anew from its launches or inputs; returns their names."""
    done = []
    for section in sections.SECTIONS.values():
        record = store.record(folder, section.name)
        stored = record.get("tables", {})
        for dataset in section.datasets:
            if stored.get(dataset.name, {}).get("method_version") == dataset.method_version:
                store.merge_journal(folder, dataset, stored[dataset.name]["keys"])
                done.append(dataset.name)
        for derived in section.derived:
            if derived.name in stored:
                compute(store, folder, derived, recorded_parameters(section, record))
                done.append(derived.name)
    return done
