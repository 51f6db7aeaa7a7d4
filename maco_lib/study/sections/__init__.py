"""The sections of the study, in the order of the report."""

from maco_lib.study.sections import bandwidth, environment, inference, linear_all_reduce, overlap, when_to_overlap
from maco_lib.study.spec import Dataset, Derived, Section

SECTIONS: dict[str, Section] = {
    module.SECTION.name: module.SECTION
    for module in (environment, overlap, inference, bandwidth, when_to_overlap, linear_all_reduce)
}


def section(name: str) -> Section:
    """The section called `name`; raises ValueError with the valid names."""
    if name not in SECTIONS:
        raise ValueError(f"unknown section {name!r}; the sections are {', '.join(SECTIONS)}")
    return SECTIONS[name]


def table(name: str) -> tuple[Section, Dataset | Derived]:
    """The table called `name` and the section that fills it; raises ValueError with the valid names."""
    tables = {entry.name: (owner, entry) for owner in SECTIONS.values() for entry in (*owner.datasets, *owner.derived)}
    if name not in tables:
        raise ValueError(f"unknown table {name!r}; the tables are {', '.join(tables)}")
    return tables[name]
