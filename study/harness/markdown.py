"""Foreign text in the report: errors, paths, names of machines and models, as text that no Markdown reader takes apart.

What comes from outside goes through `verbatim` (or `lines`, `code`, `address`) where it enters Markdown, and nowhere
else; pandoc then escapes for HTML and typst.
"""

import re
import urllib.parse

# One line's markup: what may begin or end emphasis, code, links, HTML, math, strikeout, mentions or a table's cell; and
# addresses and emoji, which pandoc's GitHub Markdown also knows. An underscore within a word is none.
MARKUP = re.compile(r"[\\`*\[\]<>&$~|@^{}]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//|[\w+-]+:)|(?<=www)\.", re.ASCII)
ENTITIES = {"\\": "&#92;", "|": "&#124;", "<": "&lt;", ">": "&gt;", "&": "&amp;"}
# A line that begins so would be a heading, a list, a rule or the line under a heading.
BLOCK = re.compile(r"^(?:[#+=]|-(?=[\s-]|$)|\d{1,9}(?=[.)](?:\s|$)))")
CONTROLS = {number: chr(0x2400 + number) for number in range(32)} | {0x7F: "\u2421"}  # shown as the signs for them


def one_line(foreign: object) -> str:
    """Without what no file in UTF-8 can hold or no reader can show; not yet safe in Markdown."""
    readable = str(foreign).encode("utf-8", "backslashreplace").decode()
    return " ".join(readable.split()).translate(CONTROLS)


def verbatim(foreign: object) -> str:
    """`foreign` on one line of Markdown: every character is shown as it is, runs of white space as one space."""
    line = one_line(foreign)
    escaped = MARKUP.sub(lambda sign: ENTITIES.get(sign[0], "\\" + sign[0]), line)
    start = BLOCK.match(line)
    if not start:
        return escaped
    return f"{start[0]}\\{escaped[start.end() :]}" if start[0].isdigit() else "\\" + escaped


def lines(foreign: str, prefix: str = "") -> str:
    """The same for text of several lines, each on its own; `prefix` is what they are inside of, "> " in a quotation."""
    shown = [(len(line) - len(line.lstrip()), verbatim(line)) for line in foreign.splitlines()]
    return f"\\\n{prefix}".join("\u00a0" * indent + line for indent, line in shown if line)


def code(foreign: object) -> str:
    """`foreign` as code on one line; as plain text where it holds the sign that would end the code."""
    return verbatim(foreign) if "`" in str(foreign) else f"`{one_line(foreign)}`"


def address(path: str) -> str:
    """A relative path as the target of a link or an image."""
    return urllib.parse.quote(path)
