"""README.md and the pages of docs/: their blocks of code, and the commands in these."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt


ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]


@dataclass
class Block:
    """Code between fences; `place` is its page and line."""

    language: str
    text: str
    place: str

    @property
    def code(self) -> list[str]:
        """Its lines but for empty ones and those that are only a comment."""
        return [line for line in self.text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


@dataclass
class Command:
    words: list[str]
    environment: dict[str, str]
    output: str | None = None  # the file that its output goes to


def read_page(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def section(page: str, heading: str) -> str:
    """The text under a heading, up to the next one of the same level or higher."""
    text = f"\n{read_page(page)}"
    start = text.index(f"\n{heading}\n") + len(heading) + 2
    following = re.search(rf"^#{{1,{len(heading.split()[0])}}} ", text[start:], re.M)
    return text[start : start + following.start()] if following else text[start:]


def blocks(text: str, page: str = "") -> list[Block]:
    tokens = MarkdownIt().parse(text)
    return [Block(t.info, t.content, f"{page}:{t.map[0] + 1}") for t in tokens if t.type in ("fence", "code_block")]


def inline_code(text: str) -> list[str]:
    """The texts between backticks."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return [child.content for token in tokens for child in token.children or [] if child.type == "code_inline"]


def commands(text: str) -> list[Command]:
    """Commands of a block, one a line, several with `&&` between them; `\\` at its end continues a line."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&>")
        lexer.whitespace_split = True
        words = list(lexer)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            found.append(_command(words[:end]))
            words = words[end + 1 :]
    return found


def _command(words: list[str]) -> Command:
    output = words[words.index(">") + 1] if ">" in words else None
    words = words[: words.index(">")] if output else words
    environment = {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    return Command(words, environment, output)
