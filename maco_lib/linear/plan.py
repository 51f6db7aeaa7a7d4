"""Plans of `linear_all_reduce`: the ways to multiply and sum, and their names. Without torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from maco_lib.linear.techniques.persistent_time import TILINGS, ascii_tiling

AUTO = "auto"  # in place of a plan: the fastest one of this machine
TECHNIQUES = ("sequential", "chunked", "persistent", "decode")
HOPPER = ("persistent", "decode")  # kernels of ours multiply, and sum without a backend
# What "chunked" is tried with: backends that leave the matmul its SMs, and numbers of chunks.
LIGHT_BACKENDS = ("maco_staged_8", "maco_push_64", "gloo")
NUM_CHUNKS = (2, 4, 8)
FORMS = "sequential[:BACKEND], chunked:NUMBER[:BACKEND], persistent[:TILING], decode"


@dataclass(frozen=True)
class LinearPlan:
    """A way to run a matmul and the all-reduce of its result, for x (M, K) and weight (N, K).

    technique: of `TECHNIQUES`, each a file of `linear.techniques`. backend: of `maco_lib.comm.BACKENDS`; "":
    the device's default (NCCL or gloo), and the only value for "persistent" and "decode", which sum by themselves.
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
        if self.technique not in TECHNIQUES:
            raise ValueError(f"unknown technique {self.technique!r}; the techniques are {', '.join(TECHNIQUES)}")
        if self.technique in HOPPER and self.backend:
            raise ValueError(f"backend = {self.backend!r}: {self.technique} sums by itself, without a backend")
        cuts = self.technique == "chunked"
        if not isinstance(self.num_chunks, int) or self.num_chunks < 1 or cuts != (self.num_chunks > 1):
            valid = "an int of 2 or more" if cuts else "1"
            raise ValueError(f"num_chunks = {self.num_chunks!r}: for {self.technique} it is {valid}")
        tilings = ["", *map(str, TILINGS)] if self.technique == "persistent" else [""]
        if self.tiling not in tilings:
            valid = ", ".join(map(repr, tilings))
            raise ValueError(f"tiling = {self.tiling!r}: for {self.technique} it is {valid}")
        number = str(self.num_chunks) if cuts else ""
        name = ":".join(filter(None, (self.technique, number, self.backend, self.tiling)))
        object.__setattr__(self, "name", name)

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, name: str) -> "LinearPlan":
        """The plan of that name; of what stored tables call it, too: "chunked, 4 along m, nccl", "persistent, 2 × 128".

        Raises ValueError with the forms of a name, or what is wrong with a part of it.
        """
        technique, *rest = _of_stored_words(name).split(":")
        try:
            if technique == "chunked":
                return cls(technique, *rest[1:], num_chunks=int(rest[0]))
            if technique == "persistent":
                return cls(technique, tiling=":".join(rest))
            return cls(technique, *rest)
        except (IndexError, TypeError, ValueError) as error:
            why = f": {error}" if type(error) is ValueError and technique in TECHNIQUES else ""
            raise ValueError(f"{name!r} is not the name of a plan{why}; names are {FORMS}") from None

    @property
    def overlapped(self) -> bool:
        """Whether it communicates while it multiplies."""
        return self.technique != "sequential"


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
    plans = [LinearPlan(backend=name) for name in backends]
    plans += [LinearPlan("chunked", name, num) for name in backends if name in LIGHT_BACKENDS for num in NUM_CHUNKS]
    if kind == "cuda":
        plans += [LinearPlan("persistent", tiling=str(tiling)) for tiling in TILINGS]
        plans += [LinearPlan("decode")]
    return plans
