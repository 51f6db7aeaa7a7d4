"""REPORT.html and REPORT.pdf from REPORT.md, offline: pandoc makes both, typst sets the PDF. Neither is committed."""

import pathlib
import re
import tempfile

from study.harness.files import write_atomically

TITLE = "MACO: results"
CSS = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 15px/1.5 "DejaVu Sans", system-ui, sans-serif; }
table { border-collapse: collapse; font-size: 12px; display: block; overflow-x: auto; }
th, td { border: 1px solid #ccc; padding: 3px 7px; text-align: left; vertical-align: top; }
img { max-width: 100%; }
blockquote { border-left: 4px solid #d55e00; margin-left: 0; padding-left: 1rem; }
"""
TYPST = """
#set page(paper: "a4", margin: 1.4cm, numbering: "1")
#set text(size: 9pt)
#set table(inset: 3pt, stroke: 0.3pt + luma(180), align: left)
#show table: set text(size: 6.5pt)
#show table: set par(justify: false)
#show figure: set block(breakable: true)
#show heading: set block(above: 1.2em, below: 0.7em)
"""
# Where pandoc's typst takes text for markup: "#strong[x].y" is a field of x, "-?" a soft hyphen, and at the begin of a
# cell or an item "-", "+", "=", "/" and "1." begin a list or a heading.
TYPST_FILTER = r"""
local calls = {Strong = true, Emph = true, Strikeout = true, Link = true, Image = true}
local function character(text) return pandoc.RawInline("typst", ("\\u{%x}"):format(text:byte())) end
function Inlines(list)
  for place = #list - 1, 1, -1 do
    local call, after = list[place], list[place + 1]
    local called = calls[call.t] or (call.t == "Code" and call.text:find("`", 1, true))
    if called and after.t == "Str" and after.text:find("^[.(%[{;]") then
      list:insert(place + 1, pandoc.RawInline("typst", ";"))
    end
  end
  return list
end
function Str(word)
  local text = word.text
  if text:find("^[-+/]$") or text:find("^=+$") or text:find("^%d+[.]$") then
    return {character(text), pandoc.Str(text:sub(2))}
  end
  local place = text:find("-?", 1, true)
  if place then
    local rest = pandoc.Str(text:sub(place + 1))
    return pandoc.Inlines{pandoc.Str(text:sub(1, place - 1)), character("-")} .. pandoc.Inlines(Str(rest) or {rest})
  end
end
"""


def is_current(root: pathlib.Path) -> bool:
    """Whether HTML and PDF are there, and no older than REPORT.md and the figures that they hold."""
    made = [root / "REPORT.html", root / "REPORT.pdf"]
    if not all(path.exists() for path in made):
        return False
    sources = [root / "REPORT.md", *(root / "figures").glob("*/*.png")]
    return min(path.stat().st_mtime for path in made) >= max(path.stat().st_mtime for path in sources)


def build(root: pathlib.Path) -> list[pathlib.Path]:
    """Write REPORT.html (images embedded) and REPORT.pdf beside REPORT.md; returns the files written.

    Where pypandoc or typst is not installed, one line says so and the rest is written: they are a convenience.
    """
    try:
        import pypandoc
    except ImportError:
        print("REPORT.html and REPORT.pdf are not written: pypandoc is not installed (pip install pypandoc_binary)")
        return []
    written = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        style, html = scratch / "style.html", scratch / "REPORT.html"
        style.write_text(f"<style>{CSS}</style>", encoding="utf-8")
        options = ["--standalone", "--embed-resources", "--resource-path", str(root), "--include-in-header", str(style),
                   "--metadata", f"pagetitle={TITLE}"]  # fmt: skip
        pypandoc.convert_file(str(root / "REPORT.md"), "html5", format="gfm", outputfile=str(html), extra_args=options)
        write_atomically(root / "REPORT.html", html.read_bytes())
        written.append(root / "REPORT.html")
    try:
        import typst
    except ImportError:
        print("REPORT.pdf is not written: typst is not installed (pip install typst)")
        return written
    source = typst_source(root / "REPORT.md")
    # pandoc centres every cell of a table without widths; text reads better from the left.
    source = re.sub(r"align: \((?:auto,)+\)", "align: left", source)
    document = f'#set document(title: "{TITLE}", date: none)\n{TYPST}\n{PREAMBLE}\n{source}'
    write_atomically(root / "REPORT.pdf", typst.compile(document.encode(), root=str(root)))
    return [*written, root / "REPORT.pdf"]


def typst_source(path: pathlib.Path) -> str:
    """A Markdown file as typst."""
    import pypandoc

    with tempfile.TemporaryDirectory() as folder:
        script = pathlib.Path(folder) / "text.lua"
        script.write_text(TYPST_FILTER, encoding="utf-8")
        options = ["--wrap=none", "--lua-filter", str(script)]
        return pypandoc.convert_file(str(path), "typst", format="gfm", extra_args=options)


# What pandoc's own template would define and its typst text uses.
PREAMBLE = """
#let horizontalrule = line(start: (25%, 0%), end: (75%, 0%))
"""
