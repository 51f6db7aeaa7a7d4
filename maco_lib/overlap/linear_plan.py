"""Plans of `linear_all_reduce`: the ways to multiply and sum. Without torch."""

from collections.abc import Iterable
from dataclasses import dataclass

from maco_lib.overlap.linear_techniques.persistent_time import TILINGS

AUTO = "auto"  # in place of a plan: the fastest one of this machine
TECHNIQUES = ("sequential", "chunked", "signalled", "persistent", "decode")
CUTTING = ("chunked", "signalled")  # sum the result in pieces
HOPPER = ("signalled", "persistent", "decode")  # multiply with kernels of ours
SUMMING = ("persistent", "decode")  # sum by themselves, without a backend
DIMS = ("m", "n")
# What "chunked" is tried with: backends that leave the matmul its SMs, and numbers of chunks along M. (Along N the
# tiles are as many, x is read once a chunk, and the sums have to be copied.)
LIGHT_BACKENDS = ("maco_staged_8", "maco_push_64", "gloo")
NUM_CHUNKS = (2, 4, 8)
# And "signalled", whose bands cost the matmul nothing; the first of its backends leaves nothing to be copied.
BAND_BACKENDS, NUM_BANDS = ("maco_one_shot_64", "maco_staged_8", "maco_push_64"), (4, 8)


@dataclass(frozen=True)
class LinearPlan:
    """A way to run a matmul and the all-reduce of its result, for x (M, K) and weight (N, K).

    technique: of `TECHNIQUES`, each a file of `overlap.linear_techniques`. backend: of `maco_lib.comm.BACKENDS`; "":
    the device's default (NCCL or gloo), and the only value for those that sum by themselves, `SUMMING`. num_chunks: for
    "chunked", and of "signalled" the bands, 2 or more; else 1. dim: what "chunked" cuts, "m" (rows) or "n" (columns of
    the result); else "m". tiling: of "persistent", `str` of one of `TILINGS`, or "": that which is predicted to be the
    fastest without a calibration. Raises ValueError naming what is wrong.
    """

    technique: str = "sequential"
    backend: str = ""
    num_chunks: int = 1
    dim: str = "m"
    tiling: str = ""

    def __post_init__(self) -> None:
        if self.technique not in TECHNIQUES:
            raise ValueError(f"unknown technique {self.technique!r}; the techniques are {', '.join(TECHNIQUES)}")
        if self.technique in SUMMING and self.backend:
            raise ValueError(f"backend = {self.backend!r}: {self.technique} sums by itself, without a backend")
        if self.dim not in DIMS:
            raise ValueError(f"unknown dim {self.dim!r}; the dims are {', '.join(DIMS)}")
        if self.technique == "signalled" and self.dim != "m":
            raise ValueError(f"dim = {self.dim!r}: signalled cuts 'm' only")
        cuts = self.technique in CUTTING
        if not isinstance(self.num_chunks, int) or self.num_chunks < 1 or cuts != (self.num_chunks > 1):
            valid = "an int of 2 or more" if cuts else "1"
            raise ValueError(f"num_chunks = {self.num_chunks!r}: for {self.technique} it is {valid}")
        tilings = ["", *map(str, TILINGS)] if self.technique == "persistent" else [""]
        if self.tiling not in tilings:
            valid = ", ".join(map(repr, tilings))
            raise ValueError(f"tiling = {self.tiling!r}: for {self.technique} it is {valid}")

    def __str__(self) -> str:
        """Its parts: "chunked, 4 along m, nccl"."""
        if self.technique in SUMMING:
            return ", ".join(filter(None, (self.technique, self.tiling)))
        words = [self.technique, self.backend or "default backend"]
        if self.technique in CUTTING:
            words.insert(1, f"{self.num_chunks} along {self.dim}")
        return ", ".join(words)

    @property
    def parts(self) -> tuple[str, str, int, str, str]:
        """What a custom operator can be called with: `LinearPlan(*parts)` is the plan."""
        return self.technique, self.backend, self.num_chunks, self.dim, self.tiling

    @property
    def overlapped(self) -> bool:
        """Whether it communicates while it multiplies."""
        return self.technique != "sequential"


def candidates(kind: str, backends: Iterable[str]) -> list[LinearPlan]:
    """The plans that "auto" chooses from on a `kind` of device ("cpu" or "cuda") with these backends."""
    backends = list(backends)
    plans = [LinearPlan(backend=name) for name in backends]
    plans += [LinearPlan("chunked", name, num) for name in backends if name in LIGHT_BACKENDS for num in NUM_CHUNKS]
    if kind == "cuda":
        plans += [LinearPlan("signalled", name, num) for name in backends if name in BAND_BACKENDS for num in NUM_BANDS]
        plans += [LinearPlan("persistent", tiling=str(tiling)) for tiling in TILINGS]
        plans += [LinearPlan("decode")]
    return plans
