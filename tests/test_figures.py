"""Figures: equal bytes for equal data, one look per method, and an error that names what is missing."""

import hashlib
import itertools
import pathlib
import subprocess
import sys

import pandas as pd
import pytest
import stored

from study.drawing import looks, style
from study.harness.files import CHECKOUT
from study.published import tables as published
from study.report import figures
from study.results.store import DataError
from study.sections.registry import SECTIONS


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stored.study(tmp_path_factory.mktemp("study"))


def test_every_figure_of_every_section_is_drawn(store):
    for section in SECTIONS.values():
        for name in figures.of_section(section.name):
            figure, numbers = figures.draw(store, "h200-x2", name)
            assert figure.get_size_inches()[0] in (style.NARROW_IN, style.WIDE_IN)
            assert len(numbers) > 0


def test_techniques_are_drawn_with_the_fraction_of_ideal_and_failures_in_place(store):
    tables = {
        "overlap": store.read("h200-x2", "overlap"),
        "published.overlap": published.numbers(store.root, "overlap"),
    }
    failing = tables["overlap"].query("method == 'two_stream'").assign(method="vllm_custom_stream")
    times = [name for name in failing if name.endswith("_us")]
    failing[times] = float("nan")
    spec = figures.figure_spec("overlap_techniques")
    figure, numbers = spec.draw({**tables, "overlap": pd.concat([tables["overlap"], failing])}, "h200-x2")
    row = numbers.query("method == 'two_stream' and matmul_n == 2048").iloc[0]
    assert row["fraction"] == pytest.approx(row["ideal_us"] / row["t_overlap_us"])
    assert row["fraction_lo"] < row["fraction"] < row["fraction_hi"]
    panel = figure.axes[0]
    assert "failed" in {text.get_text() for text in panel.texts}
    assert [line.get_xdata()[0] for line in panel.lines[:2]] == [1, 0.95]  # the ideal and what is to be reached


def test_what_taken_cores_cost_is_drawn_for_a_cpu_too():
    rows = pd.DataFrame({
        "matmul_n": 1024, "asked": "threads", "technique": ["alone", "threads"], "num_sms": [0, 1],
        "hold_part": [0.0, 1.0], "t_comp_us": [100.0, 190.0], "t_comp_lo_us": [99.0, 189.0],
        "t_comp_hi_us": [101.0, 191.0],
    })  # fmt: skip
    spec = figures.figure_spec("overlap_sm_sharing")
    _, numbers = spec.draw({"sm_sharing": rows}, "cpu-2")
    assert numbers["slowdown"].tolist() == [1.9]
    with pytest.raises(style.NothingToDraw, match="no finished matmul with SMs taken"):
        spec.draw({"sm_sharing": rows.iloc[:1]}, "cpu-2")


def test_names_at_the_ends_of_lines_cover_nothing(store):
    """13 all-reduces that all end at the same place: every name is written, none over another."""
    table = store.read("h200-x2", "bandwidth").query("collective == 'all_reduce' and backend == 'nccl'")
    names = [name for name in looks.LOOKS if name.startswith(("symm_mem", "maco_", "copy_", "vllm_custom", "nccl_s"))]
    names = [name for name in names if not name.endswith("_stream")] + ["nccl", "nccl_cta4", "nccl_cta8"]
    same = pd.concat([table.assign(backend=name) for name in names])
    figure, _ = figures.figure_spec("bandwidth_busbw").draw({"bandwidth": same}, "h200-x2")
    figure.draw_without_rendering()
    for axis in figure.get_axes():
        boxes = [text.get_window_extent() for text in axis.texts]
        assert len(boxes) == len(names)
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_two_processes_write_the_same_bytes_whatever_fonts_the_system_has(store, tmp_path):
    """In the other process "DejaVu Sans" is the font with serifs, and matplotlib's own is not known by that name."""
    program = (
        "import dataclasses, pathlib, sys; from study.report import figures; from study.results.store import Store\n"
        "from matplotlib.font_manager import findfont, fontManager\n"
        "serif = findfont('DejaVu Serif')\n"
        "for number, entry in enumerate(fontManager.ttflist):\n"
        "    if entry.name == 'DejaVu Sans':\n"
        "        fontManager.ttflist[number] = dataclasses.replace(entry, fname=serif)\n"
        "store = Store(pathlib.Path(sys.argv[1])); store.figures = pathlib.Path(sys.argv[2])\n"
        "figures.write(store, 'h200-x2', 'overlap_published')"
    )
    here, there = tmp_path / "here", tmp_path / "there"
    figures.write(_with_figures(store, here), "h200-x2", "overlap_published")
    subprocess.run([sys.executable, "-c", program, str(store.root), str(there)], check=True, cwd=CHECKOUT)
    digests = []
    for folder in (here, there):
        files = sorted((folder / "h200-x2").iterdir())
        assert [path.name for path in files] == [f"overlap_published.{kind}" for kind in sorted(style.FORMATS)]
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert digests[0] == digests[1]


def test_a_users_matplotlibrc_changes_nothing(store, tmp_path):
    plain = figures.write(_with_figures(store, tmp_path / "plain"), "h200-x2", "inference_latency")
    with style.matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red"}):
        styled = figures.write(_with_figures(store, tmp_path / "styled"), "h200-x2", "inference_latency")
    assert [path.read_bytes() for path in plain] == [path.read_bytes() for path in styled]


def _with_figures(store, folder: pathlib.Path):
    copy = type(store)(store.root)
    copy.figures = folder
    return copy


def test_a_missing_table_is_named_with_the_machine(tmp_path):
    store = stored.study(tmp_path)
    (store.data / "h200-x2" / "bandwidth.csv").unlink()
    with pytest.raises(DataError, match=r"bandwidth_published of h200-x2 needs the table bandwidth: .*bandwidth\.csv"):
        figures.draw(store, "h200-x2", "bandwidth_published")


def test_an_unknown_figure_is_answered_with_the_valid_ones(store):
    with pytest.raises(ValueError, match="unknown figure 'nope'.*overlap_published"):
        figures.draw(store, "h200-x2", "nope")


def test_a_method_that_is_not_in_the_table_looks_like_no_other():
    known = {(look.colour, look.marker) for look in looks.LOOKS.values()}
    for name in ("three_stream", "mine", "mine_cta4"):
        look = looks.look(name)
        assert look.label == name and (look.colour, look.marker) not in known and look == looks.look(name)
    with pytest.raises(ValueError, match="no label for 'a[*]b'"):
        looks.look("a*b")
    assert looks.ordered(["mine_cta4", "nccl_cta8", "mine", "gloo", "gloo"]) == [
        "nccl_cta8",
        "gloo",
        "mine",
        "mine_cta4",
    ]


def test_no_two_methods_look_the_same():
    names = [*looks.LOOKS, *(f"{family}_cta{n}" for family in ("two_stream", "nccl") for n in (1, 2, 8, 16, 24, 32))]
    known = [looks.look(name) for name in names if not name.endswith("_cta")]
    families = ("sequential", "two_stream"), ("nccl", "gloo", "symm_mem"), ("transformers", "vllm"), ("Qwen3",)
    for prefixes in families:
        family = [look for name, look in zip([n for n in names if not n.endswith("_cta")], known, strict=True)
                  if name.startswith(prefixes)]  # fmt: skip
        for one, other in itertools.combinations(family, 2):
            assert (one.colour, one.marker) != (other.colour, other.marker), (one.label, other.label)
            assert one.label != other.label
