"""Notebooks executed headless: by this very interpreter, in UTF-8, and tidied without harm to their images."""

import base64
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest

from study.harness.files import CHECKOUT, without_places


def test_only_text_is_tidied(tmp_path):
    import nbformat  # here, since it takes seconds

    from study.commands import execute

    temporary = tempfile.gettempdir()
    # A picture whose letters in base64 happen to be a path.
    picture = base64.b64encode(base64.b64decode("iVBO" + temporary * 4 + "AAA=")).decode()
    assert temporary in picture
    text = f"{temporary}/x and {sys.prefix}/lib and {CHECKOUT}/maco_lib/a.py"
    html = f'<img src="data:image/png;base64,{picture}"> {temporary}'
    data = {"text/plain": text, "text/html": html, "image/png": picture}
    error = nbformat.v4.new_output("error", ename="Error", evalue=text, traceback=[text])
    printed = nbformat.v4.new_output("stream", text=text)
    shown = nbformat.v4.new_output("display_data", data=data)
    cell = nbformat.v4.new_code_cell(f"open('{temporary}/x')", outputs=[error, printed, shown])
    path = tmp_path / "book.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    execute.tidy(path)
    (cell,) = nbformat.read(path, as_version=4).cells
    tidied = "<tmp>/x and <python>/lib and maco_lib/a.py"
    error, printed, shown = cell.outputs
    assert (error.evalue, error.traceback, printed.text, shown.data["text/plain"]) == (tidied, [tidied], tidied, tidied)
    assert cell.source == "open('<tmp>/x')"
    assert shown.data["image/png"] == picture
    assert shown.data["text/html"] == f'<img src="data:image/png;base64,{picture}"> <tmp>'


def test_a_place_is_a_whole_path():
    temporary = tempfile.gettempdir()
    for text in (f"{temporary}-of-mine", f"/var{temporary}", f"a{temporary}/b"):
        assert without_places(text) == text


def made_locale(name: str, folder: pathlib.Path) -> dict[str, str]:
    """The variables that set a locale, made in `folder` by localedef; skips where it lacks the sources."""
    language, encoding = name.split(".")
    made = subprocess.run(["localedef", "-i", language, "-f", encoding, folder / name], capture_output=True, text=True)
    if made.returncode > 1 or not (folder / name).exists():
        pytest.skip(f"localedef cannot make {name} here: {made.stderr.strip().splitlines()[-1]}")
    return {"LOCPATH": str(folder), "LC_ALL": name}


@pytest.mark.parametrize("locale", ["C", "en_US.ISO-8859-1"])
def test_a_notebook_runs_in_this_interpreter_and_in_utf8(tmp_path, locale):
    """Whatever kernel called python3 comes first on JUPYTER_PATH, and in a locale that is not UTF-8."""
    if locale != "C" and shutil.which("localedef") is None:
        pytest.skip("no localedef to make a locale with")
    language = {"LC_ALL": locale} if locale == "C" else made_locale(locale, tmp_path)
    other = {"argv": ["false", "{connection_file}"], "display_name": "Another Python", "language": "python"}
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(json.dumps(other))
    book, output = tmp_path / "book.ipynb", tmp_path / "executed.ipynb"
    source = "import sys\nprint('12 µs', sys.executable == executable)"
    cell = {"cell_type": "code", "source": source, "metadata": {}, "outputs": [], "execution_count": None}
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = {"cells": [cell], "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}
    book.write_text(json.dumps(notebook), encoding="utf-8")
    environment = {
        **os.environ, "JUPYTER_PATH": str(tmp_path), "PYTHONPATH": str(CHECKOUT), "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0", "HOME": "/nonexistent", **language,
    }  # fmt: skip
    command = [sys.executable, "-m", "study.commands.execute", str(book), str(output)]
    command.append(json.dumps({"executable": sys.executable}))
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert "12 µs True" in pathlib.Path(output).read_text(encoding="utf-8")
