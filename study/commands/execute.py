"""Execute one notebook headless: `python -m study.commands.execute NOTEBOOK OUTPUT PARAMETERS_JSON`."""

import contextlib
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import nbformat
import papermill

from study.harness.files import NOTEBOOK_FAILED, without_places

KERNEL = "python3"


def tidy(path: pathlib.Path) -> None:
    """Leave out what would change every executed copy: papermill's times, and where this machine keeps its files.

    Only text is changed: inside the base64 of an image the same letters mean something else.
    """
    book = nbformat.read(path, as_version=4)
    book.metadata.pop("papermill", None)
    for cell in book.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        cell.source = without_places(cell.source)
        for output in cell.get("outputs", []):
            for name in ("text", "evalue"):
                if name in output:
                    output[name] = without_places(output[name])
            if "traceback" in output:
                output.traceback = [without_places(line) for line in output.traceback]
            for kind, content in output.get("data", {}).items():
                if kind.startswith("text/") and isinstance(content, str):
                    output.data[kind] = without_places(content)
    text = nbformat.writes(book)
    path.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")


@contextlib.contextmanager
def own_kernel() -> Iterator[None]:
    """Within, the kernel called python3 is this very interpreter, whatever else is installed under that name.

    Jupyter's own files lie in a folder that goes away: neither a home nor what somebody's settings say is needed.
    """
    with tempfile.TemporaryDirectory(prefix="maco-kernel-") as folder:
        specification = {
            "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "Python 3",
            "language": "python",
        }
        path = pathlib.Path(folder, "kernels", KERNEL, "kernel.json")
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(specification), encoding="utf-8")
        own = dict.fromkeys(("JUPYTER_PATH", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"), folder)
        before = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def main(notebook: str, output: str, parameters: str) -> None:
    try:
        with own_kernel():
            papermill.execute_notebook(
                notebook, output, parameters=json.loads(parameters), kernel_name=KERNEL, progress_bar=False, cwd="."
            )
    except papermill.PapermillExecutionError as error:
        sys.exit(f"{NOTEBOOK_FAILED}\n{error.ename}: {error.evalue}")
    finally:
        if pathlib.Path(output).exists():
            tidy(pathlib.Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
