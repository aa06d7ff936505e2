"""Strict JSON and text: what Python accepts, or passes on as another error, is refused in one sentence."""

import json
import os
import time

import pytest

from upperson.files import parse_json, read_text, write_atomically


@pytest.mark.parametrize(
    "text, problem",
    [
        ('{"identity": NaN}', "^field 'identity': NaN is not a number that JSON allows; found at column 14 "),
        ('[{"a": "NaN", "b" :\n [1, NaN]}]', "^field 'b': NaN is not .*; found at line 2, column 6 "),
        ("[1, -Infinity]", "-Infinity is not a number that JSON allows"),
        ('{"a": 1e999}', "the number 1e999 exceeds the range of float64"),
        ('{"a": 1, "b": {"c": 2, "c": 2}}', "the key 'c' stands twice in one object, {'c': 2}"),
        ('{"caption": "a man \\ud83d"}', "the string at field 'caption' holds half of a surrogate pair"),
        ('[{"captions": ["ok", "\\udc00"]}]', r"the string at entry 0.captions\[1\] holds half"),
        ('{"\\ud800": 1}', "the string at a key of the top holds half"),
        ("9" * 5000, "a number of 5000 digits; expected at most 400"),
        ("[" * 100_000, "the JSON is nested too deeply"),
        ('{"a":' * 100_000, "the JSON is nested too deeply"),
        ("[1,\n 2", r"invalid or truncated JSON at line 2, column 3 \(character 6 of 6\)"),
        ("", "invalid or truncated JSON at column 1 "),
        (b"\xff[]", "expected UTF-8 text; byte 0 is invalid"),
    ],
)
def test_refused(text, problem):
    with pytest.raises(ValueError, match=problem) as refusal:
        parse_json(text)
    assert not isinstance(refusal.value, (json.JSONDecodeError, UnicodeDecodeError))


def test_what_is_right_is_what_python_reads():
    content = {"a": [1, -2.5, 1e-400, True, None, 10**300], "ü": {"": "👍 \U0001f44d"}, "long": ["x"] * 1000}
    text = json.dumps(content)
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize("text", ['"\\ud83d\\ude00"', '"\\\\ud83d"', '{"\\ud83d\\ude00": ["\\ud83d\\ude00"]}'])
def test_whole_surrogate_pairs_are_right(text):
    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("é".encode("cp1252"), "expected UTF-8 text; byte 0 is invalid; a file in cp1252"),
        ("a,b".encode("utf-16"), "expected UTF-8 text; byte 0 is invalid; the file seems to be UTF-16"),
        ("a,b".encode("utf-16-le"), "expected UTF-8 text; character 1 is NUL; the file seems to be UTF-16"),
        (b"abcdef\0", "expected UTF-8 text; character 6 is NUL$"),
    ],
)
def test_text_of_other_encodings(tmp_path, content, problem):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=problem) as refusal:
        read_text(tmp_path / "a")
    assert not isinstance(refusal.value, UnicodeDecodeError)


@pytest.mark.parametrize("content", ["one\r\ntwo\rthree\n", "\ufeffone\ntwo\nthree\n"])
def test_text(tmp_path, content):
    (tmp_path / "a").write_text(content, encoding="utf-8", newline="")
    assert read_text(tmp_path / "a") == "one\ntwo\nthree\n"


def test_what_is_not_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name, found in (("fifo", "a FIFO"), ("device", "a device"), (".", "a folder")):
        with pytest.raises(OSError, match=f"expected a regular file, found {found}") as refusal:
            read_text(tmp_path / name)
        assert refusal.value.filename == str(tmp_path / name)


def test_text_is_written_in_utf_8(tmp_path):
    write_atomically(tmp_path / "a.json", '"→ \udcff"')
    assert (tmp_path / "a.json").read_bytes() == '"→ \\udcff"'.encode()


def test_a_million_values_are_read_fast():
    """As in MSCOCO's annotations. The walk through all strings is taken only where a surrogate is possible."""
    text = json.dumps([{"id": number, "caption": "ü"} for number in range(100_000)], ensure_ascii=False)
    started = time.process_time()
    assert len(parse_json(text)) == 100_000
    assert time.process_time() - started < 5
