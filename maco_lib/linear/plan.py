"""Plans of `linear_all_reduce`: the ways to multiply and sum, and their names. Without torch until one is made."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from maco_lib.linear.techniques import techniques
from maco_lib.linear.techniques.persistent_time import ascii_tiling
from maco_lib.linear.techniques.technique import Technique

AUTO = "auto"  # in place of a plan: the fastest one of this machine
ARGUMENTS = {"num_chunks": 1, "tiling": ""}  # of plans without one of their own


@dataclass(frozen=True)
class LinearPlan:
    """A way to run a matmul and the all-reduce of its result, for x (M, K) and weight (N, K).

    technique: each a file of `linear.techniques`. backend: of `maco_lib.comm.BACKENDS`; "": the device's default (NCCL
    or gloo), and the only value for "persistent" and "decode", which sum by themselves.
    num_chunks: pieces of the rows, for "chunked" 2 or more; else 1. tiling: of "persistent", `str` of one of `TILINGS`,
    or "": that which is predicted to be the fastest (`persistent_time`). Raises ValueError naming what is wrong.

    name: what `str` gives and `parse` reads, one word of ASCII, the same in code, tables and operators' arguments:
    "sequential:nccl", "chunked:4:maco_staged_8", "persistent:2x128-staggered", "decode".
    """

    technique: str = "sequential"
    backend: str = ""
    num_chunks: int = 1
    tiling: str = ""
    name: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        way = technique(self.technique)
        if self.backend and not way.takes_backend:
            raise ValueError(f"backend = {self.backend!r}: {self.technique} sums by itself, without a backend")
        argument = ""
        for place, default in ARGUMENTS.items():
            value, own = getattr(self, place), way.argument is not None and way.argument.field == place
            if not (way.argument.accepts(value) if own else value == default and type(value) is type(default)):
                valid = way.argument.values if own else repr(default)
                raise ValueError(f"{place} = {value!r}: for {self.technique} it is {valid}")
            argument = str(value) if own else argument
        object.__setattr__(self, "name", ":".join(filter(None, (self.technique, argument, self.backend))))

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, name: str) -> "LinearPlan":
        """The plan of that name; of what stored tables call it, too: "chunked, 4 along m, nccl", "persistent, 2 × 128".

        Raises ValueError with the forms of a name, or what is wrong with a part of it.
        """
        way, *rest = _of_stored_words(name).split(":")
        argument = techniques()[way].argument if way in techniques() else None
        try:
            if argument is None or not rest and argument.accepts(ARGUMENTS[argument.field]):
                return cls(way, *rest)
            return cls(way, *rest[1:], **{argument.field: argument.read(rest[0])})
        except (IndexError, TypeError, ValueError) as error:
            why = f": {error}" if type(error) is ValueError and way in techniques() else ""
            forms = ", ".join(one.form(one.argument and ARGUMENTS[one.argument.field]) for one in techniques().values())
            raise ValueError(f"{name!r} is not the name of a plan{why}; names are {forms}") from None

    def covers(self, num_rows: int) -> bool:
        """Whether it is a plan for so many rows: "chunked" where they make as many chunks, "decode" up to its most."""
        return technique(self.technique).covers(self, num_rows)

    @property
    def overlapped(self) -> bool:
        """Whether it communicates while it multiplies."""
        return self.technique != "sequential"


def technique(name: str) -> Technique:
    """The technique called `name`; raises ValueError with the valid names."""
    if name not in techniques():
        raise ValueError(f"unknown technique {name!r}; the techniques are {', '.join(techniques())}")
    return techniques()[name]


def _of_stored_words(text: str) -> str:
    """The name of a plan that a table from before there were names calls `text`; other texts as they are."""
    technique, *words = text.split(", ")
    if technique == "persistent":
        return ":".join([technique, *map(ascii_tiling, words)])
    words = [re.sub(r"^(\d+) along m$", r"\1", word) for word in words if word != "default backend"]
    return ":".join([technique, *words])


def candidates(kind: str, backends: Iterable[str]) -> list[LinearPlan]:
    """The plans that "auto" chooses from on a `kind` of device ("cpu" or "cuda") with these backends."""
    backends = list(backends)
    return [LinearPlan.parse(name) for way in techniques().values() for name in way.candidates(kind, backends)]
