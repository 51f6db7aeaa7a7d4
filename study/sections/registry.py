"""The sections of the study, in the order of the report."""

from study.harness.spec import Dataset, Derived, Section
from study.sections.bandwidth import section as bandwidth
from study.sections.environment import section as environment
from study.sections.inference import section as inference
from study.sections.linear_all_reduce import section as linear_all_reduce
from study.sections.overlap import section as overlap
from study.sections.when_to_overlap import section as when_to_overlap

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
