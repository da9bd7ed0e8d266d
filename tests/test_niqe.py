"""NIQE where pictures are small, flat or odd; `test_published_metrics.py` has its figures."""

import math

import numpy as np
import pytest
from damaged_pictures import blurred, noisy, photograph

from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.metrics import make_metric
from faithdiff_jax.evaluation.metrics.niqe import niqe


def test_damage_is_worse():
    image = photograph(200, 300)
    assert niqe(image) < min(niqe(blurred(image, 2)), niqe(noisy(image, 25)))


def test_blocks_that_are_not_whole_are_left_out():
    image = photograph(210, 300)
    assert niqe(image) == niqe(np.ascontiguousarray(image[:192, :288]))


def test_a_picture_without_texture_has_no_figure():
    flat = np.full((192, 192, 3), 130, np.uint8)
    assert math.isnan(niqe(flat))
    flat[:96] = photograph(96, 192)
    assert math.isfinite(niqe(flat))


@pytest.mark.parametrize(("height", "width", "message"), [
    (100, 100, "a picture of 100x100 pixels is too small: NIQE needs two blocks of 96x96 at least"),
    (95, 300, "pictures of 300x95 pixels are too small: each side must have at least 96"),
])  # fmt: skip
def test_pictures_that_are_too_small(height, width, message):
    with pytest.raises(InputError, match=message):
        make_metric("niqe")(photograph(height, width))


def test_a_reference_is_refused():
    image = photograph(96, 192)
    with pytest.raises(InputError, match="niqe takes no reference: it judges a picture by itself"):
        make_metric("niqe")(image, image)
