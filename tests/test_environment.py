"""run_all.sh prepares an environment, or says in one line why it cannot and exits non-zero."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from hashlib import sha256

import pip
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
    """python3 runs and lacks every package; in the environments that it makes lies this one's pip, which is quicker."""
    base = pathlib.Path(sys.base_prefix) / "bin" / "python3"
    pips = pathlib.Path(pip.__file__).parent
    made = f'"{base}" -m venv --without-pip "$3" && ln -s "{pips}" "$3"/lib/python*/site-packages'
    command(checkout, "python3", f'case "$*" in "-m venv "*) {made};; *) exec "{base}" -S "$@";; esac')


def surroundings(checkout, *arguments, **variables):
    inherited = {key: os.environ[key] for key in os.environ if key not in ("MACO_PYTHON", "VIRTUAL_ENV", "PYTHONPATH")}
    environment = inherited | {"PATH": f"{checkout.parent / 'bin'}:{os.environ['PATH']}"} | variables
    return {"args": ["bash", "run_all.sh", *arguments], "cwd": checkout, "env": environment, "text": True}


def start(checkout, *arguments, timeout=240, **variables):
    return subprocess.run(**surroundings(checkout, *arguments, **variables), capture_output=True, timeout=timeout)


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
        *_, line = refusal(start(checkout, **offline))
        assert "is there a network?" in line and ".venv/install.log" in line
        assert not (checkout / ".venv" / "maco-lock").exists()


def wheel(folder, name, version="1.0", **files):
    """Write a wheel with those files; returns its line of a lock."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    information = f"{name}-{version}.dist-info"
    files |= {
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{information}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{information}/RECORD", "".join(f"{file},,\n" for file in [*files, f"{information}/RECORD"]))
    return f"{name}=={version} \\\n    --hash=sha256:{sha256(path.read_bytes()).hexdigest()}\n"


@pytest.fixture
def registry(checkout):
    """A folder of wheels that stand for the lock's packages, and the settings that make it all there is to pip."""
    bare_python(checkout)
    command(checkout, "nvidia-smi", "exit 9")
    folder = checkout.parent / "wheels"
    folder.mkdir()
    lines = [
        wheel(folder, "uv", **{"uv-1.0.data/scripts/uv": "#!/bin/sh\necho error: tcp connect error\nexit 2\n"}),
        wheel(folder, "torch", **{"torch.py": ""}),
        wheel(folder, "rest", **{"rest.py": ""}),
    ]
    (checkout / "requirements" / "cpu.txt").write_text("".join(lines))
    (checkout / "study").mkdir()
    (checkout / "study" / "__init__.py").touch()
    (checkout / "study" / "__main__.py").write_text("import sys, rest, torch; print(*sys.argv[1:])")
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}


def test_pip_installs_what_uv_cannot_reach_once(checkout, registry):
    done = start(checkout, **registry)
    assert (done.returncode, done.stdout) == (0, "run\n"), done.stderr
    assert "uv is not to be had or cannot reach the packages; pip installs them" in done.stderr
    anywhere = subprocess.run([".venv/bin/python", "-P", "-c", "import maco_lib"], cwd=checkout)
    assert anywhere.returncode == 0, "notebooks opened by hand find it"
    assert start(checkout).stderr == "", "the second start installs nothing"


def test_a_package_of_another_hash_is_not_installed(checkout, registry):
    wheel(checkout.parent / "wheels", "torch", **{"torch.py": "import another"})
    *_, line = refusal(start(checkout, **registry))
    assert "torch==1.0 as offered does not have the hash that requirements/cpu.txt gives" in line
    assert not (checkout / ".venv" / "maco-lock").exists()


def test_a_file_system_without_locks_is_named(checkout):
    bare_python(checkout)
    command(checkout, "flock", "echo No locks available >&2; exit 71")
    command(checkout, "df", "printf 'head\\ndisk 9 9 3000000 9 /\\n'")
    warning, line = refusal(start(checkout))
    assert f"the file system of {checkout} has no locks" in warning and "has 3 GB" in line


def test_a_checkout_that_cannot_be_written_is_named(checkout):
    command(checkout, "python3", "exit 1")
    with tempfile.TemporaryDirectory() as folder:  # root could write all the same, so another user starts it
        copy = shutil.copytree(checkout.parent, pathlib.Path(folder, "copy")) / "checkout"
        for path in (copy, copy.parent, copy.parent.parent):
            path.chmod(0o555)
        other = {"user": 65534, "group": 65534} if os.geteuid() == 0 else {}
        done = subprocess.run(**surroundings(copy), **other, capture_output=True, timeout=60)
        for path in (copy.parent.parent, copy.parent, copy):
            path.chmod(0o755)
    (line,) = refusal(done)
    assert f"{copy} cannot be written, so .venv cannot be made" in line


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
        _, errors = running.communicate(timeout=60)
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
    (checkout / "study").mkdir()
    (checkout / "study" / "__init__.py").touch()  # a package, before which no other of that name comes
    (checkout / "study" / "__main__.py").write_text("import sys; print(sys.prefix, *sys.argv[1:])")
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    done = start(checkout, "--only", "overlap", "--report-only", PATH=path)
    assert (done.returncode, done.stdout) == (0, f"{sys.prefix} run --only overlap --report-only\n"), done.stderr
    assert not (checkout / ".venv").exists()
