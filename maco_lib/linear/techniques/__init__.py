"""How a matmul and the all-reduce of its result are run, one technique per file; `problem` is what they share.

Every module here that has a `TECHNIQUE` is found, so that a technique is added by adding its file: techniques/mine.py

    def run(problem: Problem, plan: LinearPlan) -> None: ...

    TECHNIQUE = Technique("mine", run, candidates=lambda kind, backends: ["mine"])

is what LinearPlan("mine") runs, and `plan="auto"` tries where it tunes (`technique.Technique` says the rest). Without
torch, which most techniques import: they are imported when the first plan is made.
"""

import importlib
import pkgutil

from maco_lib.linear.techniques.technique import Technique

_FOUND: dict[str, Technique] = {}  # a dict, which torch.compile looks into; not into what functools.cache keeps


def techniques() -> dict[str, Technique]:
    """The techniques by name, in their order; ValueError where two have the same name."""
    if not _FOUND:
        _FOUND.update(found())
    return _FOUND


def found() -> dict[str, Technique]:
    modules = [importlib.import_module(f"{__name__}.{entry.name}") for entry in pkgutil.iter_modules(__path__)]
    every = [module.TECHNIQUE for module in modules if hasattr(module, "TECHNIQUE")]
    by_name = {one.name: one for one in sorted(every, key=lambda one: (one.place, one.name))}
    if len(by_name) < len(every):
        raise ValueError(f"two techniques have the same name: {', '.join(sorted(one.name for one in every))}")
    return by_name
