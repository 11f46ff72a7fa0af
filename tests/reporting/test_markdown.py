import html
import re

import pytest
from markdown_it import MarkdownIt

from astrolabe_diffusers.reporting.markdown import (
    code,
    code_block,
    escape,
    escape_line,
    markdown_table,
    plain_line,
    python_text,
)


TEXTS = [
    "a cat",
    "tiny_shapes_prompt_match",
    "a | b || c",
    "`code` and ``more``",
    "<b>bold</b> <script>alert(1)</script>",
    "[link](javascript:alert(1)) ![image](http://x/y.png)",
    "[definition]: http://x",
    "[one][two] [two] []",
    "*stars* **more** _lines_ __more__ _a_b_",
    "~~gone~~ ~gone~",
    "&lt; &#60; AT&T & Co",
    r"back\\slash \\| \\`",
    "<http://x> <!-- comment --> <?x ?>",
    "# heading",
    "- item",
    "+ item",
    "3. item",
    "12) item",
    "> quotation",
    "---",
    "===",
    "```python",
    "~~~",
    "[ ] to do",
    "$x$ $$y$$",
    "ein Bär, 一只猫, \U0001f408\u200d\u2b1b",
]
RENDER = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render


def texts_of(rendered, tag):
    """What a reader sees in every `tag`; anything else inside is left as it is, and no reader would see that."""
    return [html.unescape(text.strip()) for text in re.findall(f"<{tag}(?: [^>]*)?>(.*?)</{tag}>", rendered, re.S)]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_shows_as_it_is(text):
    assert texts_of(RENDER(f"before {escape(text)} after"), "p") == [f"before {text} after"]
    assert texts_of(RENDER(f"1. {escape_line(text)}\n2. next"), "li") == [text, "next"]
    assert texts_of(RENDER(f"# {escape(text)} #"), "h1") == [text]
    assert texts_of(RENDER(f"before {code(text)} after"), "code") == [text]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_stays_in_its_cell(text):
    rendered = RENDER(markdown_table([["", text], [text, "0.5"], ["mean", "0.5"]]))
    assert texts_of(rendered, "th") == ["", text] and texts_of(rendered, "td") == [text, "0.5", "mean", "0.5"]


def test_a_text_of_several_lines_is_one():
    assert plain_line("a\n\n# b\r\nc\x1b[31m\u2028d\ud800\n") == "a # b c [31m d?"
    rendered = RENDER(markdown_table([["", "x"], ["a\nb | c", "1"]]))
    assert texts_of(rendered, "td") == ["a b | c", "1"]


@pytest.mark.parametrize("lines", ["a: 1", "a: |\n  ```\n  # heading\n  ````\nb: 2", "```"])
def test_lines_of_code_do_not_close_their_fence(lines):
    rendered = RENDER(f"{code_block(lines, 'yaml')}\n\nafter")
    (block,) = re.findall(r'<pre><code class="language-yaml">(.*?)</code></pre>', rendered, re.S)
    assert html.unescape(block) == lines + "\n" and texts_of(rendered, "p") == ["after"]


@pytest.mark.parametrize("text", [*TEXTS, 'a "quoted" text', "it's", "two\nlines", "\u202e\ud800", "\\"])
def test_a_text_in_python(text):
    literal = python_text(text)
    assert eval(literal) == text and literal.isprintable()
