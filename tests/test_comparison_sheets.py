"""Comparison sheets: the place that is marked, where it is chosen, and what is enlarged."""

import numpy as np
import pytest
from pictures import coordinates, write
from PIL import Image

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.comparison import Group, compare
from faithdiff_jax.evaluation.measured import Measured, measure
from faithdiff_jax.evaluation.sheets import CELL, LINE, MARGIN, MARK, Crop, check_crop, choose_crop, draw_sheet


def group(**pictures):
    size = next(iter(pictures.values())).shape[:2]
    return Group("a", pictures, size, [], [])


@pytest.fixture
def folders(tmp_path):
    """One picture, 96x80, by two methods that differ in a square at (40, 24), and its input of half the size."""
    truth = coordinates(80, 96)
    other = truth.copy()
    other[24:44, 40:60] = 255 - other[24:44, 40:60]
    write(tmp_path / "truth" / "p.png", truth)
    write(tmp_path / "one" / "p.png", truth)
    write(tmp_path / "two" / "p.png", other)
    write(tmp_path / "low" / "p.png", truth[::2, ::2])
    return tmp_path


def test_the_place_is_where_the_methods_differ_most():
    plain = np.full((60, 90, 3), 100, np.uint8)
    little, much = plain.copy(), plain.copy()
    little[5:15, 5:15] = 110
    much[30:40, 50:60] = 160
    assert choose_crop(group(one=plain, two=little, three=much), 10) == Crop(50, 30, 10, 10)
    # Of equal ones the topmost, then the leftmost; and a side that is too long is cut down.
    assert choose_crop(group(one=plain, two=plain), 10) == Crop(0, 0, 10, 10)
    assert choose_crop(group(one=plain, two=much), 500)[2:] == (60, 60)
    # What the input and the reference look like does not matter, if there are two methods; of one, it does.
    wild = np.where(np.arange(90)[:, None] < 8, 255, plain).astype(np.uint8)
    assert choose_crop(group(input=wild, one=plain, two=much, reference=wild), 10) == Crop(50, 30, 10, 10)
    assert choose_crop(group(one=plain, reference=much), 10) == Crop(50, 30, 10, 10)


def test_crops_are_of_that_place_in_every_column(folders):
    comparison = compare({"one": folders / "one", "two": folders / "two"}, references=folders / "truth")
    crop = Crop(40, 24, 20, 20)
    sheet, faults = draw_sheet(comparison, Measured(), ["p"], [crop], "nearest")
    assert not faults
    truth = np.asarray(Image.open(folders / "truth" / "p.png"))[24:44, 40:60]
    inner = slice(MARGIN + LINE, MARGIN + CELL - LINE)
    # The three crops are CELL wide, at the right end of the row.
    right = sheet.shape[1] - MARGIN
    for place, expected in enumerate((truth, 255 - truth, truth)):
        left = right - (3 - place) * CELL - (2 - place) * 4
        shown = sheet[inner, left + LINE : left + CELL - LINE]
        large = np.asarray(Image.fromarray(expected).resize((CELL, CELL), Image.Resampling.NEAREST))
        np.testing.assert_array_equal(shown, large[LINE:-LINE, LINE:-LINE])
        assert (sheet[MARGIN, left : left + CELL] == MARK).all()


def test_the_mark_is_around_the_place(folders):
    comparison = compare({"one": folders / "one"}, references=folders / "truth")
    sheet, _ = draw_sheet(comparison, Measured(), ["p"], [Crop(48, 40, 24, 20)])
    left = sheet[MARGIN : MARGIN + CELL, MARGIN : MARGIN + CELL * 96 // 80]
    rows, columns = np.nonzero((left == MARK).all(axis=-1))
    scale = CELL / 80
    assert (rows.min(), rows.max()) == pytest.approx((40 * scale - LINE, 60 * scale + LINE - 1), abs=1)
    assert (columns.min(), columns.max()) == pytest.approx((48 * scale - LINE, 72 * scale + LINE - 1), abs=1)


def test_input_figures_and_rows(folders):
    write(folders / "one" / "q.png", coordinates(80, 96))
    comparison = compare(
        {"one": folders / "one", "two": folders / "two"}, inputs=folders / "low", references=folders / "truth"
    )
    one_row, _ = draw_sheet(comparison, Measured(), ["p"], 20)
    measured, _ = draw_sheet(comparison, measure(comparison, ["psnr", "gmsd"]), ["p"], 20)
    assert measured.shape[0] > one_row.shape[0]
    # The second lacks "two", the input and the reference: their cells are blank, in their places.
    both, _ = draw_sheet(comparison, Measured(), ["p", "q"], [Crop(0, 0, 20, 20), Crop(76, 60, 20, 20)])
    assert both.shape[1] == one_row.shape[1]
    assert both.shape[0] > one_row.shape[0] + CELL


@pytest.mark.parametrize(
    ("crop", "message"),
    [
        (Crop(80, 0, 20, 20), "must lie in its 96x80 pixels"),
        (Crop(-1, 0, 20, 20), "must lie in"),
        (Crop(0, 0, 7, 20), "have 8 or more"),
        (Crop(0, 0, 90, 20), "more than 4 times"),
    ],
)
def test_crops_that_are_refused(crop, message):
    with pytest.raises(InputError, match=message):
        check_crop(crop, group(one=np.zeros((80, 96, 3), np.uint8)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to write"),
        (["--output=x.html", "--crop=0,0,20,20"], "--crop: is for --sheet"),
        (["--sheet=x.html"], "cannot write '.html'"),
        (["--sheet=x.png", "--crop=1,2,3"], "must be X,Y,W,H"),
        (["--sheet=x.png", "--crop=1,2,nan,4"], "must be a whole number"),
        (["--sheet=x.png", "--crop=0,0,20,20", "--crop=0,0,20,20"], "2 crops for 1 pictures"),
        (["--sheet=x.png", "--crop=0,0,200,200", "--output=x.html"], "must lie in"),
        (["--sheet=x.png", "--picture=pp"], "no method has it; did you mean 'p'?"),
    ],
)
def test_bad_input(folders, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(folders)
    before = sorted(folders.rglob("*"))
    assert run_command("gallery", ["--method=one=one", "--method=two=two", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert sorted(folders.rglob("*")) == before


def test_page_and_sheet_at_once(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    flags = ["--method=one=one", "--method=two=two", "--sheet=x.png", "--output=x.html", "--crop=40,24,20,20"]
    assert run_command("gallery", flags) == 0
    assert capsys.readouterr().out.splitlines() == ["x.png: 1 pictures, 2 columns", "x.html: 1 pictures, 2 columns"]
    assert (folders / "x.html").is_file()
    with Image.open(folders / "x.png") as sheet:
        assert sheet.width > 2 * CELL
