"""Pictures put together on paper: their pixels stay, and titles stay over their picture."""

import numpy as np

from faithdiff_jax.files.sheets import GAP, LINE, PAPER, at_most, side_by_side, stacked, titled, wrapped


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.integers(200, size=(height, width, 3)).astype(np.uint8)


def test_rows_and_columns_keep_the_pixels(rng):
    left, right = picture(rng, 30, 80), picture(rng, 20, 50)
    for together, sheet in (
        (side_by_side, lambda array: array),
        (stacked, lambda array: array.swapaxes(0, 1)),
    ):
        row = sheet(together([sheet(left), sheet(right)]))
        assert row.shape == (30, 80 + GAP + 50, 3)
        assert row.dtype == np.uint8
        np.testing.assert_array_equal(row[:, :80], left)
        np.testing.assert_array_equal(row[:20, 80 + GAP :], right)
        assert (row[:, 80 : 80 + GAP] == PAPER).all()
        assert (row[20:, 80:] == PAPER).all()


def test_titles_are_cut_where_their_picture_ends(rng):
    below = picture(rng, 30, 60)
    for title in ("short", "a title much wider than its picture", "Straße 写真", "a\nb\0"):
        sheet = titled(title, below)
        assert sheet.shape == (LINE + 30, 60, 3)
        assert (sheet[:LINE] < 128).any()
        np.testing.assert_array_equal(sheet[LINE:], below)
    assert (titled("", below)[:LINE] == PAPER).all()
    assert (titled("a title", below[:, :4])[:LINE] == PAPER).all()


def test_lines_are_wrapped_between_pieces():
    pieces = ["one", "two", "three"] * 9
    lines = wrapped(pieces, " ", 100, "  ")
    assert len(lines) > 3
    assert " ".join(lines).split() == pieces
    assert all(line.startswith("  ") for line in lines[1:])
    assert wrapped(["x" * 500, "y"], " ", 100) == ["x" * 500, "y"]
    assert wrapped([], " ", 100) == []


def test_large_pictures_are_scaled_down(rng):
    wide = picture(rng, 54, 90)
    assert at_most(wide, 90) is wide
    assert at_most(wide, 45).shape == (27, 45, 3)
