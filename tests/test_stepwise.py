"""Restoring with a look in after every step: the same picture, previews, and stopping."""

import numpy as np
import pytest
from converted import loaded
from port import normal
from test_pipeline import levels_apart, noises, photograph

from faithdiff_jax.errors import Cancelled


@pytest.mark.parametrize(
    "options",
    [{}, {"tile": 8, "batch": 2, "sampler": "dpmpp_2m"}, {"sampler": "ddpm", "guidance": 1}],
    ids=lambda options: options.get("sampler", "euler"),
)
def test_the_picture_is_that_without_looking(rng, options):
    model, image = loaded(), photograph(43, 51)
    noise = {**noises(rng, 11, 13), "steps": normal(rng, 4, 1, 11, 13, 4)}
    options = {"steps": 4, "noise": noise, **options}
    seen, previews = [], []

    def look(step, steps, preview):
        seen.append((step, steps))
        previews.append(preview())

    restored = model.restore(image, "the cat", on_step=look, **options)
    plain = model.restore(image, "the cat", **options)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    largest, share = levels_apart(restored, plain)
    assert largest <= 1  # other programs, which may round otherwise
    assert share < 0.001
    assert all((preview.shape, preview.dtype) == ((86, 102, 3), np.uint8) for preview in previews)
    away = [np.abs(preview.astype(int) - plain).mean() for preview in previews]
    assert away[0] > away[-1]
    if options.get("sampler") != "ddpm":  # what is left of the noise at the last step goes into the picture
        assert levels_apart(previews[-1], plain)[0] <= 2


def test_stopping_and_one_program_whatever_the_step():
    model, image, seen = loaded(), photograph(16, 16), []
    before = model.programs.advance.shapes_kept

    def stop(step, steps, preview):
        seen.append(step)
        return step < 2

    with pytest.raises(Cancelled, match=r"^stopped after step 2 of 5, as asked$"):
        model.restore(image, steps=5, on_step=stop)
    assert seen == [1, 2]

    def fail(step, steps, preview):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model.restore(image, steps=5, on_step=fail)
    assert model.programs.advance.shapes_kept <= before + 1
