"""Types and sizes follow from the machine: its rates are measured once, and what follows from them is kept.

`data/<machine>/sizes.json` holds the rates, and for each profile that was run the values that were chosen for each
section, so that a later start asks for the very same points.
"""

import math
from collections.abc import Mapping
from typing import Any

from study.harness import rates as machine_rates
from study.harness.files import write_json
from study.harness.machine import Machine
from study.harness.memory import resolve_ranks
from study.harness.rates import Rates
from study.harness.spec import Dataset, Point, Section, SectionParameters
from study.results.launch import child_environment, missing, plan, repeats
from study.results.store import Store

# What a profile may take to measure, engines' starts included; "full" is the reference study and takes what it takes.
MINUTES = {"smoke": 4.0, "standard": 12.0, "full": math.inf}


class Sizes:
    """What one machine folder's parameters are, by its rates; `rates` are measured on first use."""

    def __init__(self, store: Store, folder: str, machine: Machine):
        self.store, self.folder, self.machine = store, folder, machine
        self.path = store.data / folder / "sizes.json"
        self.kept: dict[str, Any] = store._read_json(self.path) if self.path.exists() else {}

    @property
    def known(self) -> bool:
        """Whether the rates were measured before."""
        return "rates" in self.kept

    @property
    def rates(self) -> Rates:
        if not self.known:
            num_ranks = max(1, resolve_ranks(None, self.machine))
            environment = child_environment(self.machine, num_ranks)
            self.kept["rates"] = machine_rates.measure(self.machine, environment, num_ranks).to_json()
            self.keep()
        return Rates.from_json(self.kept["rates"])

    def keep(self) -> None:
        self.store.claim(self.machine, self.folder)
        write_json(self.path, self.kept)

    def resolve(self, section: Section, profile: str, overrides: Mapping[str, Any] | None = None) -> SectionParameters:
        """The parameters in force here; ValueError as of `Section.resolve`."""
        section.resolve(profile, self.machine, overrides)  # refuses what is wrong before anything is measured
        chosen = self.kept.setdefault(profile, {})
        if section.name not in chosen or not is_valid(section, chosen[section.name]):
            chosen[section.name] = choose(section, profile, self.machine, self.rates)
            self.keep()
        return section.resolve(profile, self.machine, overrides, chosen[section.name])

    def forecast_s(self, section: Section, parameters: SectionParameters, force: bool = False) -> float:
        """Seconds that measuring what is missing of the section will take (all of it with `force`)."""
        total = 0.0
        for dataset, pairs in asked_of(section, parameters, self.machine):
            todo = pairs if force else missing(self.store, self.folder, dataset, pairs)
            total += seconds_of(dataset, todo, self.rates)
        return total


def is_valid(section: Section, values: Mapping[str, Any]) -> bool:
    """Whether the section still takes values that were chosen by an earlier version."""
    try:
        section.parameters(**values)
    except ValueError:
        return False
    return True


def choose(section: Section, profile: str, machine: Machine, rates: Rates) -> dict[str, Any]:
    """The largest of the profile's choices that fits into the section's share of the time; the last if none does."""
    limit_s = share_s(section, profile, machine.kind)
    for values in section.profiles[profile][machine.kind]:
        chosen = {**values, **typed(section, rates)}
        try:
            if forecast_s(section, section.resolve(profile, machine, sized=chosen), machine, rates) <= limit_s:
                break
        except ValueError:
            continue  # it does not fit into this machine's memory; the smallest one says so when it is run
    return chosen


def typed(section: Section, rates: Rates) -> dict[str, str]:
    return {"dtype": section.dtypes.get(rates.dtype, rates.dtype)} if "dtype" in section.parameters.model_fields else {}


def asked_of(
    section: Section, parameters: SectionParameters, machine: Machine
) -> list[tuple[Dataset, list[tuple[Point, int]]]]:
    """Each dataset that can be measured here, with the (point, repeat) pairs that are asked of it."""
    there = [dataset for dataset in section.datasets if not dataset.unavailable(parameters, machine)]
    return [(dataset, repeats(dataset, parameters, plan(dataset, parameters, machine))) for dataset in there]


def forecast_s(section: Section, parameters: SectionParameters, machine: Machine, rates: Rates) -> float:
    """Seconds that measuring all of the section takes on a machine with these rates."""
    return sum(seconds_of(dataset, pairs, rates) for dataset, pairs in asked_of(section, parameters, machine))


def seconds_of(dataset: Dataset, pairs: list[tuple[Point, int]], rates: Rates) -> float:
    launches: dict[tuple, Point] = {}
    for point, repeat in pairs:
        launches.setdefault((repeat, *dataset.group(point)), point)
    starts = sum(dataset.start_s(point, rates) for point in launches.values())
    return starts + sum(dataset.seconds(point, rates) for point, _ in pairs)


def share_s(section: Section, profile: str, kind: str) -> float:
    """Seconds of the profile's time that are the section's on a kind of machine."""
    return 60 * MINUTES[profile] * section.share[kind]
