"""Types and sizes follow from the machine: what is chosen, that it is kept, and that budgets bound time."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch

from maco_lib.stats import LEAST_SAMPLES, num_samples
from maco_lib.timing import Arm, interleave
from study.harness.machine import Machine, this_machine
from study.harness.rates import Rates
from study.harness.spec import PROFILES
from study.results import sizing
from study.results.sizing import MINUTES, Sizes, choose, forecast_s
from study.results.store import Store
from study.sections.inference.engines.start import ARMS, BASELINE
from study.sections.registry import SECTIONS

MIB = 2**20
CPU = Machine("cpu", 2, "cpu-2", "", 24 * 2**30, {"ram_bytes": 24 * 2**30})
GPUS = Machine("cuda", 2, "t4-x2", "", 15 * 2**30, {"link_limit_gb_per_s": None})
# By what was measured on such machines: with bf16 instructions, with AVX-512 alone, with AVX2, and two old GPUs.
FAST = Rates(2, {"bf16": 0.43e12, "fp32": 0.1e12}, {2**16: 300, MIB: 900, 2**23: 7000}, 9e9, 5.0)
PLAIN = replace(FAST, flops={"bf16": 0.0135e12, "fp32": 0.14e12})
OLD = replace(FAST, flops={"bf16": 0.0008e12, "fp32": 0.05e12})
OLD_GPUS = Rates(2, {"fp16": 30e12, "fp32": 6e12}, {2**16: 40, MIB: 300, 2**23: 2000}, 1.2e11, 8.0)
CASES = [(CPU, FAST), (CPU, PLAIN), (CPU, OLD), (GPUS, OLD_GPUS)]


def resolved(section: str, profile: str, machine: Machine, rates: Rates):
    entry = SECTIONS[section]
    return entry.resolve(profile, machine, sized=choose(entry, profile, machine, rates))


@pytest.mark.parametrize("profile", ["smoke", "standard"])
@pytest.mark.parametrize(("machine", "rates"), CASES, ids=["bf16", "avx512", "avx2", "old GPUs"])
def test_a_profile_is_forecast_to_fit_into_its_minutes_on_any_machine(machine, rates, profile):
    forecasts = {
        section.name: forecast_s(section, resolved(section.name, profile, machine, rates), machine, rates)
        for section in SECTIONS.values()
    }
    assert 0 < sum(forecasts.values()) <= 60 * MINUTES[profile], forecasts


def test_where_few_engines_can_be_started_the_baseline_and_one_of_vllm_are_left():
    assert resolved("inference", "smoke", CPU, replace(FAST, start_s=3.0)).arms == list(ARMS)
    for rates in (PLAIN, replace(PLAIN, start_s=8.0), replace(PLAIN, start_s=60.0)):
        arms = resolved("inference", "smoke", CPU, rates).arms
        assert arms[0] == BASELINE and {"vllm", "vllm_eager"} & set(arms) and len(arms) < len(ARMS)


def test_the_shares_of_the_sections_are_the_whole():
    for kind in ("cpu", "cuda"):
        assert sum(section.share[kind] for section in SECTIONS.values()) == pytest.approx(1)


def test_the_type_is_the_published_one_unless_another_is_much_faster():
    assert (FAST.dtype, PLAIN.dtype, OLD.dtype, OLD_GPUS.dtype) == ("bf16", "fp32", "fp32", "fp16")
    for section, name in (("overlap", "fp32"), ("bandwidth", "fp32"), ("linear_all_reduce", "fp32"),
                          ("when_to_overlap", "fp32"), ("environment", "fp32"), ("inference", "float32")):  # fmt: skip
        assert resolved(section, "standard", CPU, PLAIN).dtype == name
    assert resolved("inference", "standard", CPU, FAST).dtype == "bfloat16"


def test_a_slower_machine_gets_smaller_sizes_never_larger_ones():
    faster = replace(FAST, flops={name: 4 * flops for name, flops in FAST.flops.items()})
    slower = replace(OLD, flops={name: flops / 4 for name, flops in OLD.flops.items()})
    shrinks = [resolved("overlap", "standard", CPU, rates).shrink for rates in (faster, FAST, PLAIN, OLD, slower)]
    assert shrinks == sorted(shrinks) and shrinks[0] == 1 < shrinks[1] < shrinks[-1]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("section", SECTIONS.values(), ids=lambda section: section.name)
def test_every_choice_of_a_profile_is_one_that_the_section_takes(section, profile):
    for machine, rates in CASES:
        chosen = choose(section, profile, machine, rates)  # fits into this machine's memory
        roomy = replace(machine, memory_bytes=2**40)
        every = [{**values, **sizing.typed(section, rates)} for values in section.profiles[profile][machine.kind]]
        for where, values in [(machine, chosen), *((roomy, values) for values in every)]:
            parameters = section.resolve(profile, where, sized=values)
            for dataset in section.datasets:
                for point in dataset.points(parameters, where):
                    assert 0 <= dataset.seconds(point, rates) < math.inf
                    assert dataset.longest_step_s([point], rates) > 0


def test_what_was_derived_is_kept_so_that_a_second_start_measures_nothing_anew(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(sizing.machine_rates, "measure", lambda *_: measured.append(1) or PLAIN)
    overlap = SECTIONS["overlap"]
    first = Sizes(Store(tmp_path), "cpu-2", CPU).resolve(overlap, "standard")
    # Today's rates would choose otherwise: what is kept counts.
    path = tmp_path / "data" / "cpu-2" / "sizes.json"
    kept = json.loads(path.read_text(encoding="utf-8"))
    kept["rates"] = OLD.to_json()
    path.write_text(json.dumps(kept), encoding="utf-8")
    sizes = Sizes(Store(tmp_path), "cpu-2", CPU)
    assert sizes.resolve(overlap, "standard") == first and measured == [1]
    assert sizes.resolve(overlap, "standard", {"shrink": 16}).shrink == 16
    assert sizes.forecast_s(overlap, first) > 0


def test_sizes_kept_by_a_version_with_other_parameters_are_chosen_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(sizing.machine_rates, "measure", lambda *_: PLAIN)
    folder = tmp_path / "data" / "cpu-2"
    folder.mkdir(parents=True)
    kept = {"rates": PLAIN.to_json(), "standard": {"overlap": {"no_longer": 1}}}
    (folder / "sizes.json").write_text(json.dumps(kept), encoding="utf-8")
    assert Sizes(Store(tmp_path), "cpu-2", CPU).resolve(SECTIONS["overlap"], "standard").dtype == "fp32"


def test_a_wrong_parameter_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(sizing.machine_rates, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match="'nope'"):
        Sizes(Store(tmp_path), "cpu-2", CPU).resolve(SECTIONS["overlap"], "standard", {"nope": 1})


def test_the_fewest_samples_give_way_before_they_take_many_times_the_budget():
    assert num_samples(fitting=50, least=10, most=200) == 50
    assert num_samples(fitting=1000, least=10, most=200) == 200
    assert num_samples(fitting=6, least=10, most=200) == 10
    assert num_samples(fitting=2, least=10, most=200) == 6
    assert num_samples(fitting=0.001, least=10, most=200) == LEAST_SAMPLES
    assert num_samples(fitting=0.001, least=2, most=200) == 2
    runs = []

    def slow() -> None:
        runs.append(1)
        time.sleep(0.05)

    arms = [Arm("slow", slow)]
    timing = interleave(arms, group=None, device=torch.device("cpu"), budget_s=0.01, min_iterations=50, warmup=3)
    assert len(timing["slow"].slowest) == LEAST_SAMPLES and len(runs) == 1 + LEAST_SAMPLES


@pytest.mark.slow
def test_this_machine_is_measured_in_seconds(tmp_path):
    """The real program, as the first start runs it: two ranks on a CPU, every GPU elsewhere."""
    machine = this_machine()
    if machine.kind == "cuda" and machine.num_devices < 2:
        pytest.skip("one GPU has no all-reduce to measure")
    sizes = Sizes(Store(tmp_path), "here", machine)
    rates = sizes.rates
    assert set(rates.flops) <= {"bf16", "fp16", "fp32"} and min(rates.flops.values()) > 1e6
    assert rates.all_reduce_us[2**23] > rates.all_reduce_us[2**16] > 0
    assert rates.copy_bytes_per_s > 1e6 and 0 < rates.start_s < 300
    assert Sizes(Store(tmp_path), "here", machine).rates == rates
