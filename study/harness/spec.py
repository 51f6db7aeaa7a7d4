"""What a section of the study is, said once: its parameters, the points it measures and its tables.

A section is declared in `study/sections/<name>/section.py` without importing torch; what measures it is a program of
that folder.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
import pandera.pandas as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from study.harness.machine import Machine
from study.harness.rates import Rates

PROFILES = ("smoke", "standard", "full")
Profile = Literal["smoke", "standard", "full"]
Point = dict[str, Any]


class SectionParameters(BaseModel):
    """Base of every section's parameters: typed, closed (an unknown name is an error) and immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Parameters(SectionParameters):
    """What every section that measures on several ranks takes as well."""

    num_ranks: int | None = Field(None, ge=1, description="ranks to start; None: every GPU, or 2 on a CPU")
    num_launches: int = Field(1, ge=1, description="separate process launches per point; rows are medians over them")


def point_key(dataset: str, method_version: int, point: Mapping[str, Any]) -> str:
    """Identity of one measured point: 16 hex digits of the SHA-256 over what was asked, not over how the code looks."""
    text = json.dumps([dataset, method_version, point], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def smaller(largest: Mapping[str, Any], *steps: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Choices of a profile: the largest, then each as the one before it with the values of its step."""
    choices = [dict(largest)]
    for step in steps:
        choices.append({**choices[-1], **step})
    return tuple(choices)


@dataclass(frozen=True)
class Dataset:
    """A table filled by the module `program`, which torchrun starts on `num_ranks` ranks, one or more rows a point.

    `index` names the columns that identify a row; every other column is a value. `group(point)` says which points share
    a process launch, `launches(parameters, point)` how many launches a point gets. `finish` adds the columns that need
    more than one point's rows. `seconds(point, rates)` forecasts what measuring the point once takes, `start_s(first
    point, rates)` what a launch takes before its first point. `unavailable` says in one sentence why this machine can't
    measure the dataset, or returns None.
    """

    name: str
    program: str
    method_version: int
    schema: pa.DataFrameSchema
    index: tuple[str, ...]
    points: Callable[[Any, Machine], list[Point]]
    num_ranks: Callable[[Any, Machine], int]
    seconds: Callable[[Point, Rates], float]
    start_s: Callable[[Point, Rates], float] = lambda point, rates: rates.start_s
    unavailable: Callable[[Any, Machine], str | None] = lambda parameters, machine: None
    group: Callable[[Point], tuple] = lambda point: ()
    launches: Callable[[Any, Point], int] = lambda parameters, point: parameters.num_launches
    finish: Callable[[pd.DataFrame], pd.DataFrame] = lambda rows: rows
    repeated: bool = True

    def num_launches(self, parameters: SectionParameters, point: Point) -> int:
        """How many process launches the point gets: what the parameters say, once where repeating means nothing."""
        return self.launches(parameters, point) if self.repeated else 1

    def longest_step_s(self, points: Sequence[Point], rates: Rates) -> float:
        """Seconds that a launch over `points` may go on without a step, by the forecast: its start or a whole point."""
        return max(self.start_s(points[0], rates), *(self.seconds(point, rates) for point in points))

    def key(self, point: Mapping[str, Any]) -> str:
        return point_key(self.name, self.method_version, point)


@dataclass(frozen=True)
class Derived:
    """A table computed from other tables of the same machine, without measuring anything."""

    name: str
    method_version: int
    schema: pa.DataFrameSchema
    index: tuple[str, ...]
    inputs: tuple[str, ...]
    compute: Callable[[Mapping[str, pd.DataFrame], Any], pd.DataFrame]


@dataclass(frozen=True)
class Section:
    """One notebook of the study.

    `profiles[profile][machine.kind]`: values that override the parameters' defaults, the largest choice first; of a
    profile with limited time the first is taken whose forecast fits into `share[machine.kind]` of it (`sizing`).
    `dtypes`: what the parameter `dtype`, if it has one, calls the types of `Rates`, where not as they do.
    """

    name: str
    title: str
    notebook: str
    parameters: type[SectionParameters]
    profiles: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
    share: Mapping[str, float]
    dtypes: Mapping[str, str] = field(default_factory=dict)
    datasets: tuple[Dataset, ...] = ()
    derived: tuple[Derived, ...] = ()
    needs: tuple[str, ...] = field(default=())

    @property
    def tables(self) -> tuple[str, ...]:
        return tuple(table.name for table in (*self.datasets, *self.derived))

    def resolve(
        self,
        profile: str,
        machine: Machine,
        overrides: Mapping[str, Any] | None = None,
        sized: Mapping[str, Any] | None = None,
    ) -> SectionParameters:
        """The parameters in force: the class's defaults, then the profile's for this kind of machine, then `overrides`.

        sized: the profile's values as they were chosen for this machine; None: its largest choice. An override of None
        means "as the profile says". Raises ValueError naming an unknown profile or parameter, or
        the value of the wrong type, with the valid ones.
        """
        if profile not in PROFILES:
            raise ValueError(f"unknown profile {profile!r}; the profiles are {', '.join(PROFILES)}")
        given = {name: value for name, value in (overrides or {}).items() if value is not None}
        unknown = sorted(set(given) - set(self.parameters.model_fields))
        if unknown:
            valid = ", ".join(self.parameters.model_fields)
            raise ValueError(f"section {self.name!r} has no parameter {unknown[0]!r}; its parameters are {valid}")
        values = {**(self.profiles[profile][machine.kind][0] if sized is None else sized), **given}
        try:
            return self.parameters(**values)
        except ValidationError as error:
            lines = [
                f"{'.'.join(map(str, issue['loc']))} = {issue['input']!r}: {issue['msg']}" for issue in error.errors()
            ]
            raise ValueError(f"section {self.name!r}: " + "; ".join(lines)) from None


def check_rows(table: Dataset | Derived, rows: pd.DataFrame, source: str) -> pd.DataFrame:
    """Validate `rows` against the table's schema; raises ValueError naming `source`, the column and the value."""
    try:
        return table.schema.validate(rows, lazy=True)
    except pa.errors.SchemaErrors as error:
        cases: Sequence = error.failure_cases[["column", "check", "failure_case"]].astype(str).values.tolist()
        shown = "; ".join(f"column {column}: {check} fails for {case}" for column, check, case in cases[:5])
        raise ValueError(f"{source}: {len(cases)} schema failures: {shown}") from None
