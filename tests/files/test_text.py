import codecs

import pytest

from astrolabe_diffusers.files.text import parse_json, read_json, read_lines, read_text


TEXT = "a red circle\nein grünes Dreieck\n円"


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_encodings_with_their_marks(tmp_path, mark, encoding):
    (tmp_path / "file").write_bytes(mark + TEXT.encode(encoding))
    assert read_text(tmp_path / "file") == TEXT


def test_lines_end_as_files_have_them_and_nowhere_else(tmp_path):
    (tmp_path / "file").write_bytes("one\u2028line\r\ntwo\x85\x0c\x1e\rthree\n".encode())
    assert read_lines(tmp_path / "file") == ["one\u2028line", "two\x85\x0c\x1e", "three", ""]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("a\ncafé".encode("latin-1"), "no text in UTF-8: line 2 has the byte 0xe9; save it as UTF-8"),
        (codecs.BOM_UTF16_LE + b"a", "no text in UTF-16"),
        ("ab".encode("utf-16-le"), "no text: line 1 has a zero byte"),
        (bytes(range(256)), "no text"),
    ],
)
def test_other_encodings_and_other_files_are_named(tmp_path, data, words):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=words) as error:
        read_text(tmp_path / "file")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "is no JSON: Expecting value"), ('{"a": 1', "is no JSON: "), ("[" * 100_000, "is no JSON: .*recursion")],
)
def test_what_is_no_json_is_named(tmp_path, text, words):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path} {words}"):
        read_json(path)
    with pytest.raises(ValueError, match=f"the header {words}"):
        parse_json(text.encode(), "the header")


def test_json(tmp_path):
    (tmp_path / "file").write_bytes(codecs.BOM_UTF8 + '{"a": [1, "ü"]}'.encode())
    assert read_json(tmp_path / "file") == {"a": [1, "ü"]}
