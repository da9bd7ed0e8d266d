"""Words read in pictures: which are right, what counts, and files of annotations that hold nonsense."""

import contextlib
import importlib.metadata
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import write
from PIL import Image, ImageDraw, ImageFont

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation import ocr
from faithdiff_jax.evaluation.metrics import Unavailable, make_metric
from faithdiff_jax.evaluation.ocr import Counts, Word, annotated_words, clean, score, words_of_line

LINES = ["Harbour Street 1887", "No exit beyond"]


def box(x, y, width, height):
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], np.float64)


def word(text, x, width=40, *, ignored=False):
    return Word(text, box(x, 0, width, 20), ignored)


def installed():
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(ocr.PACKAGE) == ocr.VERSION
    return False


needs_reader = pytest.mark.skipif(not installed(), reason=f"{ocr.PACKAGE} {ocr.VERSION} is not installed")


@pytest.fixture(scope="module")
def sign():
    """Two lines of text, each under 24 pixels high."""
    image = Image.new("RGB", (320, 120), (235, 232, 220))
    pen = ImageDraw.Draw(image)
    for number, line in enumerate(LINES):
        pen.text((20, 18 + 48 * number), line, (20, 20, 60), ImageFont.load_default(26))
    return np.array(image)


@pytest.fixture(scope="module")
def blurred(sign):
    small = Image.fromarray(sign).resize((53, 20), Image.Resampling.BOX)
    return np.array(small.resize((320, 120), Image.Resampling.BICUBIC))


def test_words_are_right_where_they_lie_and_say_the_same():
    wanted = [word("Stop", 0), word("Here,", 50), word("now", 100)]
    assert score(wanted, wanted) == Counts(3, 3, 3)
    assert score([word("STOP!", 5), word("there", 50)], wanted) == Counts(3, 2, 1)
    # Another place: 20 of 60 pixels are shared, a third.
    assert score([word("Stop", 20)], wanted[:1]) == Counts(1, 1, 0)
    # Just over and just under one half: 27 of 53, 26 of 54.
    assert score([word("Stop", 13)], wanted[:1]).right == 1
    assert score([word("Stop", 14)], wanted[:1]).right == 0


def test_each_word_counts_once():
    wanted = [word("two", 0), word("two", 50)]
    assert score([word("two", 0), word("two", 1)], wanted) == Counts(2, 2, 1)
    # The one that overlaps most decides, in whatever order they come.
    for found in ([word("too", 0), word("two", 3)], [word("two", 3), word("too", 0)]):
        assert score(found, wanted) == Counts(2, 2, 0)


def test_regions_to_be_ignored_count_neither_way():
    wanted = [word("left", 0), word("", 100, 60, ignored=True)]
    found = [word("left", 0), word("anything", 110), word("outside", 145)]
    assert score(found, wanted) == Counts(1, 2, 1)


def test_marks_without_words_do_not_count():
    assert score([word("...", 0)], [word("()", 0)]) == Counts(0, 0, 0)
    assert clean("(Straße!)") == "strasse"
    assert clean("\uff21\uff22\uff23") == "abc"  # of full width
    assert clean("rock'n'roll") == "rock'n'roll"


@pytest.mark.parametrize(
    ("counts", "precision", "recall", "f_score"),
    [
        (Counts(4, 2, 1), 0.5, 0.25, 1 / 3),
        (Counts(4, 0, 0), 0, 0, 0),
        (Counts(0, 0, 0), 1, 1, 1),
        (Counts(0, 3, 0), 0, 1, 0),
    ],
)
def test_figures(counts, precision, recall, f_score):
    assert (counts.precision, counts.recall, counts.f_score) == pytest.approx((precision, recall, f_score))
    total = counts + Counts(2, 2, 2)
    assert total.recall == pytest.approx((counts.right + 2) / (counts.wanted + 2))


def test_a_line_is_cut_at_its_blanks():
    line = words_of_line(" ab  cdef", box(90, 10, 90, 20))
    assert [(one.text, one.corners[:, 0].tolist()) for one in line] == [
        ("ab", [100, 120, 120, 100]),
        ("cdef", [140, 180, 180, 140]),
    ]
    upright = words_of_line("a b", np.array([[10, 0], [10, 30], [0, 30], [0, 0]], np.float64))
    np.testing.assert_array_equal(upright[1].corners, [[10, 20], [10, 30], [0, 30], [0, 20]])


@needs_reader
def test_words_are_read(sign, blurred):
    found = ocr.reader()(sign)
    assert [one.text for one in found] == " ".join(LINES).split()
    wanted = annotated_words(
        [{"image_id": "sign", "text": [
            {"vertices": box(20, 18 + 48 * number, 8 + 12.2 * len(line), 30).tolist(), "transcription": line}
            for number, line in enumerate(LINES)
        ]}],
        "signs.json",
    )["sign"]  # fmt: skip
    assert score(found, wanted) == Counts(6, 6, 6)
    assert score(ocr.reader()(blurred), wanted).recall < 0.5


@needs_reader
def test_metrics(sign, blurred):
    half = sign.copy()
    half[60:] = half[0, 0]
    pictures = [sign, half, blurred]
    recall = make_metric("ocr_recall").many(pictures, [sign] * 3)
    assert recall[:2] == [1, 0.5]
    assert recall[2] < 0.5
    counts = score(ocr.reader()(half), ocr.reader()(sign))
    assert (counts.right, counts.wanted) == (3, 6)
    assert make_metric("ocr_precision").many(pictures[:2], [sign] * 2) == [1, 3 / counts.found]
    assert make_metric("ocr_f")(half, sign) == counts.f_score
    assert make_metric("ocr_recall")(blurred, np.zeros_like(sign)) == 1  # nothing to be read


@needs_reader
def test_the_command_prints_a_table(tmp_path, monkeypatch, capsys, sign, blurred):
    monkeypatch.chdir(tmp_path)
    small = np.array(Image.fromarray(blurred).resize((160, 60)))
    for folder, picture in {"ours": sign, "low": small, "truth": sign}.items():
        write(tmp_path / folder / "sign.png", picture)
    flags = ["--method=ours=ours", "--input=low"]
    assert run_command("ocr", [*flags, "--references=truth"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| | precision | recall | F-score | right | found | there |"
    assert [row.split(" | ")[0] for row in table[2:]] == ["| input", "| bicubic", "| ours"]
    assert table[4] == "| ours | 100.0 % | 100.0 % | 100.0 % | 6 | 6 | 6 |"
    entry = {"vertices": box(20, 18, 240, 30).tolist(), "transcription": LINES[0]}
    (tmp_path / "words.json").write_text(json.dumps([{"image_id": "sign", "text": [entry]}]))
    assert run_command("ocr", ["--method=ours=ours", "--annotations=words.json"]) == 0
    assert capsys.readouterr().out.splitlines()[2].endswith("| 3 | 6 | 3 |")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --references, or --annotations"),
        (["--annotations=nowhere.json"], "nowhere.json: no such file"),
        (["--annotations=deep.json"], "nested too deep"),
        (["--references=ours", "--method=ours=ours"], "is given twice"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "ours" / "sign.png", np.zeros((40, 40, 3), np.uint8))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    assert run_command("ocr", ["--method=ours=ours", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("version", [None, "1.4.4"])
def test_without_the_package_the_metric_is_unavailable(monkeypatch, version):
    def look_up(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(importlib.metadata, "version", look_up)
    with pytest.raises(Unavailable, match=r"then pip install --no-deps rapidocr-onnxruntime==1.2.3$") as caught:
        ocr.Reader()
    assert ("is not installed" if version is None else "1.4.4 reads by other networks") in str(caught.value)


def test_annotations():
    text = {"vertices": [[0, 0], [40, 0], [40, 10], [0, 10]], "transcription": "NO EXIT"}
    texts = [text, text | {"ignore": True}, {"vertices": text["vertices"]}]
    words = annotated_words([{"image_id": "a", "text": texts}, {"image_id": "b", "text": []}], "words.json")
    assert [(one.text, one.ignored) for one in words["a"]] == [
        ("NO", False), ("EXIT", False), ("NO EXIT", True), ("", True)
    ]  # fmt: skip
    assert words["b"] == []


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
POINTS = st.lists(st.lists(LEAVES, max_size=3), max_size=5)
TEXTS = st.fixed_dictionaries({}, optional={"vertices": POINTS | LEAVES, "transcription": LEAVES, "ignore": LEAVES})
LISTS = st.lists(TEXTS | LEAVES, max_size=3)
ENTRIES = st.fixed_dictionaries({}, optional={"image_id": LEAVES, "text": LISTS | LEAVES})


@settings(max_examples=200, deadline=None)
@given(st.lists(ENTRIES | LEAVES, max_size=3) | LEAVES | ENTRIES)
def test_nonsense_is_refused_in_one_line(data):
    refusal = ""
    try:
        for words in annotated_words(data, "words.json").values():
            score(words, words)
    except InputError as error:
        refusal = str(error)
    assert not refusal or re.fullmatch(r"words\.json: .*", refusal)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "must be a list of pictures"),
        ([{"image_id": "a"}], "picture 1: needs text, a list"),
        ([{"image_id": 3, "text": []}], "picture 1: needs image_id, text"),
        ([{"image_id": "a", "text": []}] * 2, "picture 2: image_id 'a' is there twice"),
        ([{"image_id": "a", "text": [{"vertices": [[0, 0]] * 3}]}], "text 1: vertices must be four points"),
        ([{"image_id": "a", "text": [{"vertices": [[0, float("nan")]] * 4}]}], "vertices must be four points"),
        ([{"image_id": "a", "text": [{"vertices": [[0, True]] * 4}]}], "vertices must be four points"),
        ([{"image_id": "a", "text": [{"vertices": [[0, 0]] * 4}]}], "must enclose an area"),
        (
            [{"image_id": "a", "text": [{"vertices": [[0, 0], [9, 0], [9, 9], [0, 9]], "ignore": 1}]}],
            "ignore true or false",
        ),
    ],
)
def test_annotations_that_are_refused(data, message):
    with pytest.raises(InputError, match=message):
        annotated_words(data, "words.json")
