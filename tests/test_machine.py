"""What this machine is: names, identity, visible GPUs, provenance; and what the driver answers, where there is one."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types

import pynvml
import pytest

from maco_lib import doctor, nvml
from study.harness import machine, provenance, sampler
from study.sections.environment.section import SECTION, points
from study.sections.inference import checkpoint

UUIDS = ["GPU-aaa1", "GPU-aab2", "GPU-ccc3"]


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [2, 0]),
        ("GPU-ccc3,GPU-aaa", [2, 0]),
        ("1,-1,2", [1]),  # CUDA ignores everything from the first invalid entry on
        ("0,7,1", [0]),
        ("1,1", [1]),
        ("GPU-aa", []),  # names two
    ],
)
def test_visible_devices_by_the_rules_of_cuda(visible, chosen):
    assert nvml.select(UUIDS, visible) == chosen


@pytest.mark.parametrize(
    ("gpus", "name"),
    [
        (["NVIDIA H200"] * 2, "h200-x2"),
        (["NVIDIA H100 80GB HBM3"], "h100-x1"),
        (["NVIDIA A100-SXM4-80GB"] * 4, "a100-x4"),
        (["NVIDIA GeForce RTX 3080 Ti"], "rtx-3080-ti-x1"),
        (["NVIDIA RTX A6000", "NVIDIA L40S"], "rtx-a6000-x1-l40s-x1"),
    ],
)
def test_machines_are_named_by_their_gpus(gpus, name):
    assert machine.machine_name(gpus) == name


def unsupported(*arguments):
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def four_h200s(monkeypatch, num_links: int, p2p: int | None) -> None:
    """A driver with four H200s of `num_links` links each; `p2p`: what it says of NVLink between two, None: nothing."""
    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 4,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUUID": lambda gpu: f"GPU-{gpu}",
        "nvmlDeviceGetName": lambda gpu: "NVIDIA H200",
        "nvmlDeviceGetMemoryInfo": lambda gpu: types.SimpleNamespace(total=150_754_820_096),
        "nvmlDeviceGetCudaComputeCapability": lambda gpu: (9, 0),
        "nvmlDeviceGetNvLinkState": lambda gpu, link: 1 if link < num_links else unsupported(),
        "nvmlDeviceGetNvLinkRemotePciInfo": lambda gpu, link: types.SimpleNamespace(busId="the switch"),
        "nvmlDeviceGetPciInfo": lambda gpu: types.SimpleNamespace(busId=f"{gpu}"),
        "nvmlDeviceGetP2PStatus": lambda first, second, index: unsupported() if p2p is None else p2p,
        "nvmlDeviceGetTopologyCommonAncestor": lambda first, second: pynvml.NVML_TOPOLOGY_SYSTEM,
        "nvmlDeviceGetMaxPcieLinkGeneration": lambda gpu: 5,
        "nvmlDeviceGetMaxPcieLinkWidth": lambda gpu: 16,
    }
    for name in dir(pynvml):
        if name.startswith("nvml") and (name in answers or name.startswith(("nvmlDeviceGet", "nvmlSystemGet"))):
            monkeypatch.setattr(pynvml, name, answers.get(name, unsupported))


@pytest.mark.parametrize(
    ("num_links", "p2p", "link", "limit", "joined"),
    [
        (18, pynvml.NVML_P2P_STATUS_OK, "NVLink", 450.0, "NV18"),
        (0, pynvml.NVML_P2P_STATUS_OK, "NVLink", None, "NV (number not told)"),
        (0, None, "unknown", None, "SYS"),
        (0, pynvml.NVML_P2P_STATUS_NOT_SUPPORTED, "PCIe", 63.008, "SYS"),
    ],
)
def test_the_link_limit_is_told_only_where_the_driver_tells(monkeypatch, num_links, p2p, link, limit, joined):
    four_h200s(monkeypatch, num_links, p2p)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    here = machine.this_machine()
    assert (here.kind, here.num_devices, here.name, here.memory_bytes) == ("cuda", 2, "h200-x2", 150_754_820_096)
    assert (here.description["link"], here.description["link_limit_gb_per_s"]) == (link, limit)
    assert here.description["topology"] == {"0-1": joined}
    quantities = {point["quantity"] for point in points(SECTION.resolve("full", here), here)}
    assert ("link_limit" in quantities) == (limit is not None)


@pytest.mark.parametrize(
    ("p2p", "visible", "apart"),
    [
        (pynvml.NVML_P2P_STATUS_OK, "0,1,2,3", ""),
        (pynvml.NVML_P2P_STATUS_NOT_SUPPORTED, "2,3", "0 and 1"),
        (None, "2,3", "0 and 1"),
        (pynvml.NVML_P2P_STATUS_OK, "2", "0 and 1"),
    ],
)
def test_what_is_not_known_to_be_nvlink_is_none(monkeypatch, p2p, visible, apart):
    four_h200s(monkeypatch, 18, p2p)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml.without_nvlink.cache_clear()
    try:
        assert nvml.without_nvlink() == apart
    finally:
        nvml.without_nvlink.cache_clear()


@pytest.mark.parametrize(
    ("p2p", "visible", "told"),
    [
        (
            pynvml.NVML_P2P_STATUS_OK, "0,1",
            {"GPUs": (True, "NVIDIA H200, NVIDIA H200"), "NVLink": (True, "between all pairs"),
             "plans": (True, "h200-x2, h200-x4")},
        ),
        (None, "0,1", {"NVLink": (None, "GPUs 0 and 1 are not known to be joined by it")}),
        (None, "2", {"GPUs": (None, "NVIDIA H200")}),
        (None, "", {"GPUs": (True, "none visible: ranks on CPUs sum over gloo")}),
    ],
)  # fmt: skip
def test_the_librarys_doctor_tells_of_gpus_and_their_plans(monkeypatch, p2p, visible, told):
    four_h200s(monkeypatch, 18, p2p)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml.without_nvlink.cache_clear()
    try:
        checks = {check.name: (check.ok, check.detail) for check in doctor.doctor()}
    finally:
        nvml.without_nvlink.cache_clear()
    assert {name: checks[name] for name in told} == told
    assert ("NVLink" in checks) == ("," in visible)


def test_this_machine_can_be_stored_and_stays_itself():
    first, second = machine.this_machine(), machine.this_machine()
    assert first == second
    assert json.loads(json.dumps(dataclasses.asdict(first)))["identity"] == first.identity
    assert first.num_devices >= 1 and first.memory_bytes > 1e8 and len(first.identity) == 16
    if first.kind == "cpu":
        assert first.name == f"cpu-{first.num_devices}"


def test_hosts_cloned_from_one_image_differ(tmp_path, monkeypatch):
    identities = set()
    for name in ("host-a", "host-b"):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / name))
        identities.add(machine.host_identity([], "some CPU"))
        assert machine.host_identity([], "some CPU") in identities
    assert len(identities) == 2


def test_identity_needs_no_writable_home(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert machine.host_identity([], "some CPU") == machine.host_identity([], "some CPU")


@pytest.mark.parametrize("command", ["doctor", "status"])
def test_a_user_without_a_home_or_an_account_needs_none(tmp_path, command):
    """HOME is unset; as root also a user id that has no account."""
    names = ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "MACO_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PYTHONPATH": str(pathlib.Path(machine.__file__).parents[2]), "MACO_ROOT": str(tmp_path)}
    # A user id without an account has no home in the passwd file either: that is what is asked for here.
    program = (
        "import pwd, runpy, sys\n"
        "def nobody(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = nobody\n"
        f"sys.argv = ['study', {command!r}]\n"
        "runpy.run_module('study', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1) and done.stderr == "" and done.stdout, done.stderr


def test_without_a_home_nothing_is_kept(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MACO_CACHE", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", homeless)
    assert machine.this_machine().identity
    with pytest.raises(ValueError, match="no home, and MACO_CACHE is not set"):
        checkpoint.resolve("Qwen3-tiny")


def test_fewer_cores_make_another_machine():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from study.harness.machine import this_machine; print(this_machine().name)"
    )
    root = pathlib.Path(machine.__file__).parents[2]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "cpu-1"


def test_provenance_lets_no_secret_through(tmp_path, monkeypatch):
    (tmp_path / "maco_lib").mkdir()
    (tmp_path / "maco_lib" / "a.py").write_text("x = 1\n")
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    record = provenance.provenance(tmp_path)
    assert "s3cret" not in json.dumps(record)
    assert record["environment"]["NCCL_ALGO"] == "Ring"
    assert record["git"] == {"commit": None, "dirty": None}
    (tmp_path / "maco_lib" / "a.py").write_text("x = 2\n")
    changed = provenance.provenance(tmp_path)["source_sha256"]
    assert changed != record["source_sha256"]
    (tmp_path / "maco_lib" / "a.cu").write_text("int x = 1;\n")
    assert provenance.provenance(tmp_path)["source_sha256"] != changed


def test_provenance_knows_the_commit_of_a_checkout_of_another_owner(tmp_path, monkeypatch):
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True)
    commit = provenance.git_state(tmp_path)["commit"]
    assert len(commit) == 40
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    refused = subprocess.run(["git", "-C", tmp_path, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert refused.returncode and "dubious ownership" in refused.stderr
    assert provenance.git_state(tmp_path) == {"commit": commit, "dirty": False}


def test_sampler_summarises_what_it_saw():
    with sampler.Sampler(period_s=0.01) as running:
        pass
    summary = running.summary()
    assert summary["num_samples"] >= 1 and len(summary["devices"]) >= 1
    for values in summary["devices"][0].values():
        assert values["min"] <= values["median"] <= values["max"]


@pytest.mark.gpu
def test_driver_answers_what_the_report_shows():
    here = machine.this_machine()
    assert here.kind == "cuda" and len(here.description["gpus"]) == here.num_devices
    assert here.description["driver"] and here.description["link_limit_gb_per_s"] > 0
    assert len(here.description["topology"]) == here.num_devices * (here.num_devices - 1) // 2
