"""Errors, names and paths reach the report as text, whatever marks they hold, in Markdown, HTML and PDF."""

import html.parser
import io
import json
import re

import pytest
import stored

from study.harness import markdown
from study.report import figures, publish, report
from study.results import evidence
from study.sections import registry as sections

MACHINE = "h200 **x**.y $2$ [a](b)#_c_"
NASTY = [
    "AttributeError: **x**.y",
    "see [x](y).z and ![i](j.png)",
    "<script>alert(1)</script> <!-- c --> <b@c>",
    "`a` ``b`` and ` alone",
    "costs $x^2$ or $$y$$, 5$",
    "a|b \\| c \\* \\(d\\) C:\\new",
    "@user #12 #let x = 1 #strong[x].y",
    "File torch/`__init__.py`, line 3, in _a_ __b__ c_d",
    "* star * ~~gone~~ ~x~ H~2~O",
    "https://e.org/a_b*.c, www.e.org",
    ":smile: a::b:c: &lt;b&gt; &amp;",
    "--force -? {{ x }} {% y %}",
    "= heading",
    "- item",
    "1. one",
    "# head",
    "=====",
    "/ term: x",
    "[^1]: note [ ] [x]: y",
    "*",
    "_",
    "`",
    "\\",
    "> quote",
]


class Reader(html.parser.HTMLParser):
    """The text and the names of the elements of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.parts, self.elements = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)

    def handle_data(self, data):
        self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.parts).replace("\u00a0", " ").split())


def typst_text(source: str) -> str:
    """Of typst's source the text: pandoc escapes every sign that could be markup, and ours are code points."""
    source = re.sub(r"\\u\{([0-9a-f]+)\}", lambda code: chr(int(code[1], 16)), source)
    source = re.sub(r"(?<!\\)~|\\\n", " ", source)
    return " ".join(re.sub(r"\\([^A-Za-z0-9\s])", r"\1", source).split())


def test_no_string_is_markup_in_any_place(tmp_path):
    pypandoc, typst = pytest.importorskip("pypandoc"), pytest.importorskip("typst")
    places = (
        "> **m: section is FAILED.** {} (hint)",
        "- {}",
        "*Not: {}*",
        "| a |\n| --- |\n| {} |",
        "### On {}",
        "{}.y",
    )
    blocks = [place.format(markdown.verbatim(nasty)) for nasty in NASTY for place in places]
    path = tmp_path / "all.md"
    path.write_text("\n\n".join(blocks), encoding="utf-8")
    page = Reader(pypandoc.convert_file(str(path), "html5", format="gfm", extra_args=["--wrap=none"]))
    frame = {"blockquote", "p", "strong", "ul", "li", "em", "table", "thead", "tbody", "tr", "th", "td", "h3"}
    assert set(page.elements) == frame
    for nasty in NASTY:
        assert page.text.count(nasty) >= len(places), nasty
    source = publish.typst_source(path)
    assert typst.compile(source.encode()).startswith(b"%PDF")
    for nasty in NASTY:
        assert typst_text(source).count(nasty) >= len(places), nasty


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study whose machine has a name full of marks; every section failed with one, and so did arms."""
    store = stored.study(tmp_path_factory.mktemp("study"))
    for section, nasty in zip(sections.SECTIONS, NASTY, strict=False):
        stored.settle(store, section, "failed", f"{nasty}\n  {NASTY[7]}\n\n" + "\n".join(NASTY))
    (store.data / "h200-x2").rename(store.data / MACHINE)
    machine = store.machine(MACHINE)
    machine["description"] |= {
        "cpu": NASTY[0],
        "os": NASTY[2],
        "gpus": [NASTY[5]] * 2,
        "link": NASTY[3],
        "driver": NASTY[4],
    }
    (store.data / MACHINE / "machine.json").write_text(json.dumps(machine), encoding="utf-8")
    for name, columns in (("overlap", "t_overlap"), ("inference", "e2e"), ("linear_all_reduce", "time")):
        _, table = sections.table(name)
        rows = store.read(MACHINE, name)
        failing = rows["method" if "method" in rows else "arm"].isin(["two_stream", "vllm", "auto"])
        rows.loc[failing, [column for column in rows if column.startswith(columns)]] = float("nan")
        rows.loc[failing, "correct"], rows.loc[failing, "error"] = False, NASTY[7]
        if name == "inference":
            rows["model"] = f"/models/{NASTY[6]}"
        store.write_table(MACHINE, table, rows, {"keys": []})
    record = store.record(MACHINE, "overlap")
    launch = {"time": "2026-11-22T12:00:00+00:00", "versions": {"torch": NASTY[1]}, "environment": {"A": NASTY[3]}}
    record["launches"] = {"one": launch | {"git": {"commit": NASTY[8]}}}
    store.write_record(MACHINE, "overlap", record)
    return store


def test_a_report_full_of_marks_is_made_in_every_format(study, monkeypatch, capsys):
    pytest.importorskip("pypandoc")
    pytest.importorskip("typst")
    figure = figures.FIGURES["bandwidth_busbw"]

    def fail(*arguments):
        raise TypeError(NASTY[0])

    monkeypatch.setattr(figures, "FIGURES", {
        "bandwidth_busbw": figures.FigureSpec("bandwidth_busbw", "bandwidth", figure.tables, figure.caption, fail),
        "inference_batch": figures.FIGURES["inference_batch"],
    })  # fmt: skip
    problems = report.build(study.root)
    assert any("could not be drawn" in problem for problem in problems)
    assert [path.name for path in publish.build(study.root)] == ["REPORT.html", "REPORT.pdf"]
    page = Reader((study.root / "REPORT.html").read_text(encoding="utf-8"))
    assert not {"script", "b", "h5"} & set(page.elements)
    assert page.elements.count("img") == 1, "the picture in a folder of that name"
    source = typst_text(publish.typst_source(study.root / "REPORT.md"))
    for nasty in [*NASTY, MACHINE, f"could not be drawn: TypeError: {NASTY[0]}", f"failed: {NASTY[7]}"]:
        assert nasty in page.text, nasty
        assert nasty in source, nasty


def test_a_dollar_in_a_figure_is_a_dollar():
    with figures.style.styled():
        figure = figures.style.new(2, 2)
        figure.subplots().set_title("$a$ and $b_{$")
        figure.savefig(io.BytesIO(), format="png")


def test_what_cannot_be_written_is_told():
    assert markdown.verbatim("a\x1b[31m \udc80") == "a\u241b\\[31m &#92;udc80"
    assert markdown.lines("one\n\n  - two\n", "> ") == "one\\\n> \u00a0\u00a0\\- two"
    assert markdown.verbatim("sm_sharing of h200-x2, 1.5 (at most)") == "sm_sharing of h200-x2, 1.5 (at most)"
    assert str(evidence.Missing("**x**")) == "\\*\\*x\\*\\*"
