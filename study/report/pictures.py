"""The figures of all machines, drawn anew or as they are stored, as the Markdown that shows them in the report."""

import concurrent.futures
import contextlib
import functools
import multiprocessing
from collections.abc import Callable, Iterator

from study.harness.markdown import address, verbatim
from study.report import figures
from study.results.evidence import Evidence
from study.results.status import UNAVAILABLE
from study.results.store import DataError, Store


def draw_all(
    store: Store, machines: list[Evidence], redraw: bool, processes: int = 1
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Draw the machines' figures (with `redraw` false only the missing ones), printing a line a machine.

    Returns by machine and name the link to each figure or why it is not there, and the problems.
    """
    pictures, problems = {}, []
    with drawing(store, processes) as draw:
        started = {evidence.name: {name: draw(evidence.name, name) for name in wanted(store, evidence, redraw)}
                   for evidence in machines}  # fmt: skip
        for evidence in machines:
            begun, pictures[evidence.name] = started[evidence.name], {}
            num_drawn = 0
            for name, spec in of_run_sections(evidence).items():
                error = begun[name]() if name in begun else None
                num_drawn += name in begun and not error
                pictures[evidence.name][name] = picture(store, evidence, spec, error)
                if error and is_problem(error, evidence, spec):
                    problems.append(str(error))
            print(f"{evidence.name}: {num_drawn} figures drawn", flush=True)
    return pictures, problems


def of_run_sections(evidence: Evidence) -> dict[str, figures.FigureSpec]:
    """The figures of the sections that were run on a machine."""
    return {
        name: spec
        for name, spec in figures.FIGURES.items()
        if evidence.sections[spec.section].state not in ("missing", UNAVAILABLE)
    }


def wanted(store: Store, evidence: Evidence, redraw: bool) -> list[str]:
    """Those that are to be drawn: all of them, or the missing ones."""
    folder = store.figures / evidence.name
    return [name for name in of_run_sections(evidence) if redraw or not (folder / f"{name}.png").exists()]


@contextlib.contextmanager
def drawing(store: Store, processes: int) -> Iterator[Callable[[str, str], Callable[[], DataError | None]]]:
    """Gives what starts to draw a figure of a machine, which gives how to wait for it: None, or why it is not there."""
    if processes == 1:
        yield lambda machine, name: functools.partial(drawn, store, machine, name)
        return
    with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield lambda machine, name: pool.submit(drawn, store, machine, name).result


def drawn(store: Store, machine: str, name: str) -> DataError | None:
    try:
        figures.write(store, machine, name)
    except DataError as error:
        return error
    return None


def picture(store: Store, evidence: Evidence, spec: figures.FigureSpec, error: DataError | None) -> str:
    """The link to a figure with its caption, or why it is not there."""
    if error:
        return f"*Not drawn: {verbatim(error)}*"
    path = store.figures / evidence.name / f"{spec.name}.png"
    link, of = address(path.relative_to(store.root).as_posix()), verbatim(evidence.name)
    return f"![{spec.name}, {of}]({link})\n\n*{of}: {spec.caption}*"


def is_problem(error: DataError, evidence: Evidence, spec: figures.FigureSpec) -> bool:
    """A figure that fails is one always; one without its data is one where the section is complete and was asked for
    its tables."""
    asked = all(table in evidence.tables for table in spec.tables if "." not in table)
    return isinstance(error, figures.FigureError) or (evidence.sections[spec.section].usable and asked)
