"""Execute one notebook headless: `python -m maco_lib.study.execute NOTEBOOK OUTPUT PARAMETERS_JSON`."""

import json
import pathlib
import sys

import nbformat
import papermill


def strip_timestamps(path: pathlib.Path) -> None:
    """Leave out what papermill adds about this run: paths and times that would change every executed copy."""
    book = nbformat.read(path, as_version=4)
    book.metadata.pop("papermill", None)
    for cell in book.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
    nbformat.write(book, path)


def main(notebook: str, output: str, parameters: str) -> None:
    try:
        papermill.execute_notebook(
            notebook, output, parameters=json.loads(parameters), kernel_name="python3", progress_bar=False, cwd="."
        )
    except papermill.PapermillExecutionError as error:
        sys.exit(f"{error.ename}: {error.evalue}")
    finally:
        if pathlib.Path(output).exists():
            strip_timestamps(pathlib.Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
