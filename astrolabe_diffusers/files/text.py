"""Text files as editors, spreadsheets and language models write them."""

import codecs
import json
import math
import re
from pathlib import Path
from typing import Any


# The longer marks first: that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
# The ends of lines in files. `str.splitlines` would also split at characters that stand within a sentence, such as
# U+2028 or U+0085.
_LINE_END = re.compile(r"\r\n|\n|\r")


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, or in the Unicode encoding that the mark at its beginning names, without the mark.
    A `ValueError` says where it is in another encoding, or no text."""
    data = Path(path).read_bytes()
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is no text in {encoding.removesuffix('-sig').upper()}: line {line} has the byte "
            f"0x{data[error.start]:02x}; save it as UTF-8."
        ) from None
    if "\0" in text:
        raise ValueError(f"{path} is no text: line {text.count(chr(10), 0, text.index(chr(0))) + 1} has a zero byte.")
    return text


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file; see [`read_text`]."""
    return _LINE_END.split(read_text(path))


def read_json(path: str | Path) -> Any:
    """What a JSON file holds; see [`read_text`] and [`parse_json`]."""
    return parse_json(read_text(path), path)


def to_json(value: Any, indent: int | None = None) -> str:
    """The JSON of a value, with null for numbers that are not finite: JSON has none, and Python's `NaN` is refused by
    other readers."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(text: str | bytes, what: str | Path) -> Any:
    """What a JSON text says; a `ValueError` that begins with `what` if it is none, or nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        deep = "it is nested too deeply, " if isinstance(error, RecursionError) else ""
        raise ValueError(f"{what} is no JSON: {deep}{error}") from None
