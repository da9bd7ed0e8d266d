"""The heat map over a picture."""

import numpy as np

from faithdiff_jax.evaluation.attribution import attribution_sheet
from faithdiff_jax.files.sheets import LINE


def test_where_a_word_counts_most_its_colour_covers_the_picture():
    picture = np.full((40, 60, 3), 100, np.uint8)
    attribution = np.tile(np.linspace(0.01, 0.05, 60, dtype=np.float32), (40, 1))
    sheet = attribution_sheet(picture, "cat", attribution)
    assert sheet.shape == (40 + 4 * LINE, 60, 3)
    shown, legend = sheet[LINE : LINE + 40], sheet[LINE + 40 : 2 * LINE + 40]
    np.testing.assert_array_equal(shown[:, 0], picture[:, 0])
    np.testing.assert_array_equal(shown[:, -1], np.broadcast_to(legend[0, -1], (40, 3)))
    red, _, blue = np.moveaxis(legend[0].astype(int), 1, 0)
    assert red[-1] > blue[-1]
    assert blue[10] > red[10]


def test_a_map_without_differences_leaves_the_picture():
    picture = np.full((20, 60, 3), 100, np.uint8)
    sheet = attribution_sheet(picture, "cat", np.full((20, 60), 0.5, np.float32))
    np.testing.assert_array_equal(sheet[LINE : LINE + 20], picture)
