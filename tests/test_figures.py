"""Figures: equal bytes for equal data, one look per method, and an error that names what is missing."""

import hashlib
import itertools
import pathlib
import subprocess
import sys

import pytest
import stored

from maco_lib.study import figures
from maco_lib.study.figures import style
from maco_lib.study.files import CHECKOUT
from maco_lib.study.sections import SECTIONS
from maco_lib.study.store import DataError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stored.study(tmp_path_factory.mktemp("study"))


def test_every_figure_of_every_section_is_drawn(store):
    for section in SECTIONS.values():
        for name in section.figures:
            figure, numbers = figures.draw(store, "h200-x2", name)
            assert figure.get_size_inches()[0] in (style.NARROW_IN, style.WIDE_IN)
            assert len(numbers) > 0
    assert {name for section in SECTIONS.values() for name in section.figures} == set(figures.FIGURES)


def test_two_processes_write_the_same_bytes(store, tmp_path):
    program = (
        "import pathlib, sys; from maco_lib.study import figures; from maco_lib.study.store import Store\n"
        "store = Store(pathlib.Path(sys.argv[1])); store.figures = pathlib.Path(sys.argv[2])\n"
        "figures.write(store, 'h200-x2', 'overlap_published')"
    )
    digests = []
    for run in ("first", "second"):
        folder = tmp_path / run
        subprocess.run([sys.executable, "-c", program, str(store.root), str(folder)], check=True, cwd=CHECKOUT)
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


def test_an_unknown_figure_or_method_is_answered_with_the_valid_ones(store):
    with pytest.raises(ValueError, match="unknown figure 'nope'.*overlap_published"):
        figures.draw(store, "h200-x2", "nope")
    with pytest.raises(ValueError, match="no colour and marker for 'three_stream'.*two_stream"):
        style.look("three_stream")


def test_no_two_methods_look_the_same():
    names = [*style.LOOKS, *(f"{family}_cta{n}" for family in ("two_stream", "nccl") for n in (1, 2, 8, 16, 24, 32))]
    looks = [style.look(name) for name in names if not name.endswith("_cta")]
    families = ("sequential", "two_stream"), ("nccl", "gloo", "symm_mem"), ("transformers", "vllm"), ("Qwen3",)
    for prefixes in families:
        family = [look for name, look in zip([n for n in names if not n.endswith("_cta")], looks, strict=True)
                  if name.startswith(prefixes)]  # fmt: skip
        for one, other in itertools.combinations(family, 2):
            assert (one.colour, one.marker) != (other.colour, other.marker), (one.label, other.label)
            assert one.label != other.label
