"""Texts of users, such as prompts and names of files, in Markdown: they show as what they are, whatever is in them."""

import re
from collections.abc import Sequence


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# What begins something wherever it stands (CommonMark and GitHub's tables, strikethrough and formulas); `]` only where
# it could end the text of a link or of its definition, `_` at the edge of a word, `&` before what may be an entity.
_SPECIAL = re.compile(r"[\\`*<|~$]|\](?=[(\[:])|_(?![^\W_])|(?<![^\W_])_|&(?=#|\w)")
# What begins a heading, a list, a quotation, a box to tick or a rule at the start of a line.
_START = re.compile(r"^(?:(\d+)(?=[.)])|(?=[#+=>\[-]))")


def plain_line(text: str) -> str:
    """A text as one line that UTF-8 can hold: without control characters and halves of characters."""
    return _CONTROL.sub(" ", text.encode("utf-8", "replace").decode()).strip()


def escape(text: str) -> str:
    """A text that Markdown shows as it is, in one line, inside a line or a cell of a table."""
    return _SPECIAL.sub(r"\\\g<0>", plain_line(text))


def escape_line(text: str) -> str:
    """As [`escape`], at the start of a line or of an item of a list."""
    return _START.sub(r"\1\\", escape(text), count=1)


def code(text: str) -> str:
    """A text as code in a line."""
    text = plain_line(text)
    fence = "`" * (_longest_run(text) + 1)
    space = " " * (text.startswith("`") or text.endswith("`") or not text)
    return f"{fence}{space}{text}{space}{fence}"


def code_block(text: str, language: str) -> str:
    """Lines of code between fences that none of them closes."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def python_text(text: str) -> str:
    """A Python literal of one line, in double quotes where these need nothing to be escaped."""
    return repr(text) if not text.isprintable() or set(text) & set('"\\') else f'"{text}"'


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table of any texts in GitHub's Markdown, padded to be read as text too; the first row has the headings."""
    rows = [[escape(cell) for cell in row] for row in rows]
    widths = [max(2, *map(len, column)) for column in zip(*rows)]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))] for row in rows
    ]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
