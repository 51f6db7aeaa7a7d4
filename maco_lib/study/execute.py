"""Execute one notebook headless: `python -m maco_lib.study.execute NOTEBOOK OUTPUT PARAMETERS_JSON`."""

import json
import pathlib
import sys
import tempfile

import nbformat
import papermill

from maco_lib.study.files import CHECKOUT


def tidy(path: pathlib.Path) -> None:
    """Leave out what would change every executed copy: papermill's times, and where this machine keeps its files."""
    book = nbformat.read(path, as_version=4)
    book.metadata.pop("papermill", None)
    for cell in book.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
    text = nbformat.writes(book)
    for place, name in ((f"{CHECKOUT}/", ""), (sys.prefix, "<python>"), (tempfile.gettempdir(), "<tmp>")):
        text = text.replace(place, name)
    path.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")


def main(notebook: str, output: str, parameters: str) -> None:
    try:
        papermill.execute_notebook(
            notebook, output, parameters=json.loads(parameters), kernel_name="python3", progress_bar=False, cwd="."
        )
    except papermill.PapermillExecutionError as error:
        sys.exit(f"{error.ename}: {error.evalue}")
    finally:
        if pathlib.Path(output).exists():
            tidy(pathlib.Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
