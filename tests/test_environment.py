"""run_all.sh prepares an environment, or says in one line why it cannot and exits non-zero."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path):
    """A copy of the files that make the environment, with folder `bin` first on the PATH."""
    copy = tmp_path / "checkout"
    shutil.copytree(CHECKOUT / "requirements", copy / "requirements")
    for name in ("run_all.sh", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, copy)
    (tmp_path / "bin").mkdir()
    return copy


def command(checkout, name, text):
    path = checkout.parent / "bin" / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def bare_python(checkout):
    """python3 runs and lacks every package."""
    base = pathlib.Path(sys.base_prefix) / "bin" / "python3"
    command(checkout, "python3", f'exec "{base}" -S "$@"')


def surroundings(checkout, **variables):
    inherited = {key: os.environ[key] for key in os.environ if key not in ("MACO_PYTHON", "VIRTUAL_ENV", "PYTHONPATH")}
    environment = inherited | {"PATH": f"{checkout.parent / 'bin'}:{os.environ['PATH']}"} | variables
    return {"args": ["bash", "run_all.sh"], "cwd": checkout, "env": environment, "text": True}


def start(checkout, timeout=60, **variables):
    return subprocess.run(**surroundings(checkout, **variables), capture_output=True, timeout=timeout)


def refusal(done):
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr.strip().splitlines()


def test_maco_python_that_does_not_run(checkout):
    (line,) = refusal(start(checkout, MACO_PYTHON="./no-such-python"))
    assert line == "maco: MACO_PYTHON=./no-such-python does not run"


def test_maco_python_too_old(checkout):
    old = command(checkout, "old", 'case "$2" in *exit*) exit 1;; *) echo 3.9.2;; esac')
    (line,) = refusal(start(checkout, MACO_PYTHON=str(old)))
    assert "is Python 3.9.2; MACO needs 3.11 to 3.13" in line


def test_no_python_that_fits(checkout):
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        command(checkout, name, 'case "$2" in *exit*) exit 1;; *) echo 3.9.2;; esac')
    (line,) = refusal(start(checkout))
    assert "no Python 3.11 to 3.13" in line and "python3 is 3.9.2" in line
    assert not (checkout / ".venv").exists()


def test_too_little_disk(checkout):
    bare_python(checkout)
    command(checkout, "df", "printf 'head\\ndisk 9 9 3000000 9 /\\n'")
    (line,) = refusal(start(checkout))
    assert "needs" in line and "has 3 GB" in line
    assert not (checkout / ".venv").exists()


def test_no_network_leaves_nothing_that_looks_ready(checkout):
    bare_python(checkout)
    command(checkout, "nvidia-smi", "exit 9")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    for _ in range(2):
        *_, line = refusal(start(checkout, timeout=120, **offline))
        assert "is there a network?" in line and ".venv/install.log" in line
        assert not (checkout / ".venv" / "maco-lock").exists()


def interruptible() -> None:
    """In the child, as from a terminal: what a script starts in the background ignores SIGINT, as its children do."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupt_ends_the_installation(checkout):
    bare_python(checkout)
    command(checkout, "nvidia-smi", "exit 9")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # an index that accepts and never answers
        index = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        silent.settimeout(60)
        settings = surroundings(checkout, PIP_INDEX_URL=index, PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
        running = subprocess.Popen(**settings, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=interruptible)
        silent.accept()
        begun = [running, *psutil.Process(running.pid).children(recursive=True)]
        os.killpg(running.pid, signal.SIGINT)
        _, errors = running.communicate(timeout=10)
    assert running.returncode == 130
    assert errors.strip().splitlines()[-1] == "maco: interrupted"
    time.sleep(0.2)
    assert not [process for process in begun[1:] if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not (checkout / ".venv" / "maco-lock").exists()


def test_environment_made_by_somebody_else_is_left_alone(checkout):
    bare_python(checkout)
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "theirs").touch()
    (line,) = refusal(start(checkout))
    assert ".venv was not made by MACO" in line
    assert (checkout / ".venv" / "theirs").exists()


def test_complete_environment_is_used_without_making_one(checkout):
    (checkout / "maco_lib").mkdir()
    (checkout / "maco_lib" / "__main__.py").write_text("import sys; print(sys.prefix, *sys.argv[1:])")
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    done = start(checkout, PATH=path)
    assert (done.returncode, done.stdout) == (0, f"{sys.prefix} run\n"), done.stderr
    assert not (checkout / ".venv").exists()
