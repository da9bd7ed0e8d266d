"""Text and JSON files: read as promised, or refused in one line, whatever they hold."""

import json
import math
import os
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.reading import (
    DEPTH_LIMIT,
    parse_json,
    printable,
    read_bytes,
    read_json,
    read_text,
    require_file,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
PIECES = st.sampled_from([*'{}[],:"\\', "NaN", "1e999", "-Infinity", '"a":', "null", "9" * 400, "\\ud83d", "\x00", "é"])


@settings(max_examples=100)
@given(VALUES)
def test_what_json_can_hold_comes_back(value):
    for ascii_only in (True, False):
        assert parse_json(json.dumps(value, ensure_ascii=ascii_only), "x") == value


@settings(max_examples=200)
@given(st.lists(PIECES).map("".join) | st.binary(), st.booleans())
def test_nonsense_is_refused_in_one_line_or_parsed(text, finite):
    try:
        value = parse_json(text, "x", finite=finite)
    except InputError as error:
        message = str(error)
    else:
        message = "x: "
        json.dumps(value, allow_nan=not finite, ensure_ascii=False).encode("utf-8")
    assert message.startswith("x: ")
    assert message.isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000 + "]" * 200_000, "nested too deep, at most 64"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested too deep, at most 64"),
        ("9" * 5000, "a number of 5,000 digits"),
        ("1e999", "the number 1e999 is beyond the range of floats"),
        ("[NaN]", "NaN is not a number of JSON"),
        ("[-Infinity]", "-Infinity is not a number of JSON"),
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' occurs twice"),
        ('["\\ud83d"]', "not valid Unicode"),
        ('{"\\ud83d": 1}', "not valid Unicode"),
        ("{\n]", r"not JSON \(line 2: "),
        (b"\xff\xff", r"not JSON \(byte 0 is not UTF-8\)"),
    ],
)
def test_refused(text, message):
    with pytest.raises(InputError, match=f"^x: .*{message}"):
        parse_json(text, "x")


def test_limits_are_reached_but_not_crossed():
    with pytest.raises(InputError, match="nested too deep"):
        parse_json("[" * (DEPTH_LIMIT + 1) + "]" * (DEPTH_LIMIT + 1), "x")
    assert parse_json("[" * DEPTH_LIMIT + "]" * DEPTH_LIMIT, "x")
    float(parse_json("9" * 308, "x"))
    assert parse_json('"\\ud83d\\ude00"', "x") == "\U0001f600"
    assert math.isnan(parse_json("[NaN, -Infinity]", "x", finite=False)[0])


def test_files_are_read_up_to_a_limit(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(path) == [1]
    assert read_text(path) == "[1]"
    assert read_bytes(path, 6) == path.read_bytes()
    with pytest.raises(InputError, match=r"a\.json: too large for a file, at most 5 bytes"):
        read_bytes(path, 5)
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.json: the JSON file is not UTF-8 \(byte 0\)"):
        read_json(path)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    for name, message in {
        "pipe": "not a regular file",
        "link": "not a regular file",
        "loop": "cannot be read",
        "none": "no such file",
        "file/a": "no such file",
        "": "is a folder, name a file",
        "x" * 300: "cannot be read .File name too long.",
        "a\0b": "cannot be the name of a file",
    }.items():
        with pytest.raises(InputError, match=message):
            read_bytes(tmp_path / name, 10)
    assert require_file(tmp_path / "file") == 0


@settings(max_examples=50)
@given(st.text(st.characters(codec=None, min_codepoint=0, max_codepoint=sys.maxunicode)))
def test_printable_is_one_line_for_any_output(text):
    assert "\n" not in printable(text)
    printable(text).encode("utf-8")
    assert printable("a.png: café") == "a.png: café"
