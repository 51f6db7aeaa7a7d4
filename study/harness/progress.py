"""What a person sees while something is measured: a bar that moves when points finish, and says what is being done.

Under the runner the notebook's kernel has no terminal: its progress goes as events to the file `MACO_EVENTS`, which the
runner follows and shows. By hand in JupyterLab the bar appears in the notebook.
"""

import os
import pathlib
import sys
import time
import warnings
from typing import Any

from tqdm import TqdmWarning, tqdm

from study.harness.journal import append_line

PLAIN_EVERY_S = 10.0


class Progress:
    """A bar over `total` points of which `todo` are to be measured; `show` takes the events of the ranks."""

    def __init__(self, name: str, total: int, todo: int):
        self.name, self.total, self.todo = name, total, todo
        self.view = Forward(os.environ["MACO_EVENTS"]) if os.environ.get("MACO_EVENTS") else View()

    def __enter__(self) -> "Progress":
        self.show({"event": "plan", "dataset": self.name, "total": self.total, "todo": self.todo})
        return self

    def __exit__(self, *_: Any) -> None:
        self.show({"event": "end"})

    def show(self, event: dict[str, Any]) -> None:
        self.view.show(event)


class Forward:
    """Pass events on to the runner."""

    def __init__(self, path: str):
        self.path = pathlib.Path(path)

    def show(self, event: dict[str, Any]) -> None:
        append_line(self.path, event)


class View:
    """Show events: a tqdm bar on a terminal or in a notebook, plain lines now and then elsewhere."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.plain = not (sys.stderr.isatty() or "ipykernel" in sys.modules)
        self.last_line = 0.0

    def show(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "plan":
            self.name, self.done, self.todo, self.begin = event["dataset"], 0, event["todo"], time.monotonic()
            skipped = event["total"] - event["todo"]
            self.line(
                f"{self.name}: {event['todo']} points to measure" + (f", {skipped} already stored" if skipped else "")
            )
            if not self.plain and self.todo:
                self.bar = make_bar(self.todo, self.name)
        elif kind == "point":
            self.done += 1
            if self.bar is not None:
                self.bar.update()
        elif kind == "end":
            if self.bar is not None:
                self.bar.close()
                self.bar = None
            elif self.todo:
                self.line(f"{self.name}: {self.done}/{self.todo} points in {time.monotonic() - self.begin:.0f} s")
        doing = event.get("doing") or event.get("label")
        if doing and self.bar is not None:
            self.bar.set_postfix_str(doing[:60])
        elif doing and self.plain and time.monotonic() - self.last_line > PLAIN_EVERY_S:
            self.line(f"{self.name}: {self.done}/{self.todo} points, {time.monotonic() - self.begin:.0f} s, {doing}")

    def line(self, text: str) -> None:
        self.last_line = time.monotonic()
        if self.plain:
            print(text, file=sys.stderr, flush=True)


def make_bar(total: int, name: str) -> tqdm:
    """A bar for the terminal, or for the notebook this runs in (a text bar where ipywidgets is not installed)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)
        from tqdm.auto import tqdm as bar

        return bar(total=total, desc=name, unit="point", dynamic_ncols=True)
