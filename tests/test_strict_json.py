"""Strict JSON: what Python's reader accepts or passes on as another error is refused in one sentence."""

import json

import pytest

from upperson.files import parse_json


@pytest.mark.parametrize(
    "text, problem",
    [
        ('{"identity": NaN}', "NaN is not a number that JSON allows"),
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
