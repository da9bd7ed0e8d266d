"""Captions: the trimming rule, and caption files."""

from pathlib import Path

import pytest

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.captions import (
    CAPTION_LIMIT,
    find_caption,
    read_caption,
    read_tile_captions,
    too_long,
    trim_caption,
)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (
            "The image features a brown dog. It lies on grass. The sun is low.",
            "A brown dog. It lies on grass.",
        ),
        # A caption that ends within the two sentences keeps its own full stop beside the added one.
        ("The image shows a cat on a mat. It sleeps.", "A cat on a mat. It sleeps.."),
        ("The image features a cat", "A cat."),
        # The three words go whatever they are, and capitalising lowers the rest of the word.
        ("Two old friends NASA engineers, walk. One smiles. End", "Nasa engineers, walk. One smiles."),
        ("The image features\n\n  a  cat.\tIt  sleeps. Well. ", "A cat. It sleeps."),
        ("The image features 2.5 cats. Two sit. Rest", "2.5 cats. Two sit."),
        ("one two three four", "Four."),
        # The published rule fails on these.
        ("", ""),
        (" \n", ""),
        ("cat", "cat"),
        ("  the Black cat. ", "the Black cat."),
    ],
)
def test_trimming(caption, expected):
    assert trim_caption(caption) == expected


def test_what_is_too_long_to_be_read_is_said():
    assert too_long("word " * 75) == too_long(["word " * 75, ""]) == too_long([]) == []
    said = ["a caption of 10,000 words, of which the text encoders read the first 75 at most"]
    assert too_long("word " * 10_000) == too_long(["a", "word " * 10_000]) == said


def test_tile_captions_are_read(tmp_path):
    files = {name: tmp_path / name for name in ("a.json", "b.json", "c.txt", "d.json")}
    files["a.json"].write_text('{"caption": "a", "tile_captions": [" b ", ""]}')
    files["b.json"].write_text('{"caption": "a"}')
    files["c.txt"].write_text("a")
    assert [read_tile_captions(files[name]) for name in ("a.json", "b.json", "c.txt")] == [["b", ""], None, None]
    for wrong in ('"a"', "[1]", "null", '{"a": "b"}'):
        files["d.json"].write_text(f'{{"tile_captions": {wrong}}}')
        with pytest.raises(InputError, match=r'd\.json: "tile_captions" must be a list of strings, one for each tile'):
            read_tile_captions(files["d.json"])


def test_caption_files_are_read(tmp_path):
    (tmp_path / "a.json").write_text('{"caption": " Ein Haus. ", "score": 1}', encoding="utf-8")
    (tmp_path / "b.txt").write_text("Größe\n", encoding="utf-8-sig")
    (tmp_path / "c.txt").write_bytes(b"")
    assert read_caption(tmp_path / "a.json") == "Ein Haus."
    assert read_caption(tmp_path / "b.txt") == "Größe"
    assert read_caption(tmp_path / "c.txt") == ""


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", b"{'caption': 1}", "not JSON (line 1: "),
        ("a.json", b"", "not JSON (line 1: "),
        ("a.json", b'["a caption"]', 'no "caption" key'),
        ("a.json", b'{"Caption": "x"}', 'no "caption" key'),
        ("a.json", b'{"caption": null}', '"caption" is NoneType, it must be a string'),
        ("a.json", b'{"caption": ["x"]}', '"caption" is list, it must be a string'),
        ("a.json", b'{"caption": "x \\ud83d"}', "holds 'x \\ud83d', which is not valid Unicode"),
        ("a.json", b'{"caption": "caf\xe9"}', "the caption file is not UTF-8 (byte 16)"),
        ("a.json", b"[" * 200_000, "nested too deep, at most 64"),
        ("a.json", b'{"caption": ' + b"1" * 5000 + b"}", "not JSON that can be used (a number of 5,000 digits)"),
        ("a.json", b'{"caption": "a", "caption": "b"}', "not JSON that can be used (the key 'caption' occurs twice)"),
        ("a.txt", b"x" * (CAPTION_LIMIT + 1), "too large for a caption file, at most 1,048,576 bytes are read"),
        ("a.txt", b"\xff\xfex", "the caption file is not UTF-8 (byte 0)"),
        ("a.yaml", b"x", "a caption file ends in .json or .txt"),
    ],
)
def test_bad_caption_files_are_named(tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_caption(path)
    assert str(caught.value).startswith(f"{path}: {problem}")
    assert "\n" not in str(caught.value)


def test_missing_caption_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.txt: no such file"):
        read_caption(tmp_path / "gone.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match=r"folder\.txt: is a folder, name a caption file"):
        read_caption(tmp_path / "folder.txt")


def test_captions_are_found_in_order(tmp_path):
    image = Path("elsewhere/cat.v2.png")
    (tmp_path / "cat.json").touch()
    (tmp_path / "cat.v2.json").mkdir()
    assert find_caption(image, tmp_path) is None
    assert find_caption(image, tmp_path / "missing") is None
    for name in ("cat.v2.png.txt", "cat.v2.png.json", "cat.v2.txt"):
        (tmp_path / name).touch()
        assert find_caption(image, tmp_path) == tmp_path / name
    assert find_caption(Path("x" * 251 + ".png"), tmp_path) is None  # with .json more than a name may be
    (tmp_path / "cat.v2.json").rmdir()
    (tmp_path / "cat.v2.json").touch()
    assert find_caption(image, tmp_path) == tmp_path / "cat.v2.json"
