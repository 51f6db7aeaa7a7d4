"""`-p name=value`: parameters of a section from the command line."""

import math
import re
from typing import Any

import yaml


class Values(yaml.SafeLoader):
    """YAML with the plain values of version 1.2: 1e-2 is a number, 010 is ten, `no` and 12:30 are texts."""

    yaml_implicit_resolvers = {}


for tag, pattern, firsts in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
):
    Values.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), firsts)
Values.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """`name=value` pairs; a value is read as YAML 1.2, so `[1, 8]` is a list and `true` a truth value.

    Raises ValueError naming what is no pair, no value or no finite number.
    """
    overrides = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise ValueError(f"-p takes name=value, not {assignment!r}")
        try:
            overrides[name] = yaml.load(text, Values)
        except (yaml.YAMLError, ValueError):
            raise ValueError(f"-p {name}: {text!r} is not a value") from None
        if not is_finite(overrides[name]):
            raise ValueError(f"-p {name}: {text!r} is not a finite number")
    return overrides


def is_finite(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
