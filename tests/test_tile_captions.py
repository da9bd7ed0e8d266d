"""A caption for each tile: which part of the picture it is of, what it changes, and what is refused."""

import numpy as np
import pytest
from converted import loaded
from test_pipeline import levels_apart, photograph

from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.tile_captions import tile_boxes

TILED = {"scale": 2, "steps": 2, "tile": 8, "overlap": 0.5, "color_fix": "none", "guidance": 5.0}
PICTURE = (30, 46)  # x2: latents of 8x12, two tiles side by side
CAPTIONS = ["the cat", "a the a"]


def close(ours, theirs):
    largest, share = levels_apart(ours, theirs)
    assert largest <= 1  # of 255: another program rounds otherwise
    assert share < 0.01


def boxes_of(size, **given):
    return tile_boxes(loaded().defaults.replace(**TILED | given), loaded().config, size)


def test_boxes_are_what_the_tiles_show():
    assert boxes_of((20, 20)) == [(0, 0, 20, 20)]
    assert boxes_of(PICTURE) == [(0, 0, 32, 30), (16, 0, 46, 30)]
    four = boxes_of((64, 64), overlap=1.0)
    assert four == [(0, 0, 32, 32), (32, 0, 64, 32), (0, 32, 32, 64), (32, 32, 64, 64)]
    assert boxes_of((64, 40), scale=1, overlap=1.0) == [(0, 0, 40, 64)]
    assert boxes_of((90, 90), scale=0.7)[0] == (0, 0, 90, 90)
    padded = boxes_of((34, 64), multiple=256)  # rows of tiles of which little or nothing is of the picture
    assert {(top, bottom) for _, top, _, bottom in padded} >= {(0, 32), (16, 34), (18, 34)}
    assert all(bottom - top >= 16 and right - left >= 16 for left, top, right, bottom in padded)
    assert all(right <= 64 and bottom <= 34 for _, _, right, bottom in padded)
    assert loaded().tile_boxes(photograph(*PICTURE), **TILED) == boxes_of(PICTURE)


@pytest.mark.parametrize(
    "given",
    [
        {"batch": 2, "sampler": "dpmpp_2m", "deepcache_interval": 2, "guidance_end": 0.5},
        {"tgate_after": 0.5},
    ],
    ids=str,
)
def test_tiles_of_one_caption_are_the_picture_of_that_caption(given, monkeypatch):
    """By the program for captions of each tile, which equal captions do not need."""
    image, options = photograph(*PICTURE), TILED | given
    alone = loaded().restore(image, "the cat", **options)
    np.testing.assert_array_equal(loaded().restore(image, ["the cat"] * 2, **options), alone)
    other = loaded().restore(image, CAPTIONS, **options)
    assert levels_apart(other, alone)[0] > 1
    monkeypatch.setattr("faithdiff_jax.inference.tile_captions.set", lambda captions: range(2), raising=False)
    close(loaded().restore(image, ["the cat"] * 2, **options), alone)


def test_by_parts_in_a_batch_and_step_by_step_it_is_the_same_picture():
    image = photograph(*PICTURE)
    alone = loaded().restore(image, CAPTIONS, **TILED)
    close(loaded().restore(image, CAPTIONS, stream_above=1, **TILED), alone)
    together = loaded().restore([photograph(*PICTURE), image], ["a cat", CAPTIONS], batch=4, **TILED)
    close(together[1], alone)
    close(together[0], loaded().restore(image, "a cat", **TILED))
    close(loaded().restore(image, CAPTIONS, on_step=lambda *given: True, **TILED), alone)


def test_a_tile_is_restored_by_its_own_caption():
    """Without overlap and with one step, the left half knows nothing of what the right one is said to show."""
    options = TILED | {"overlap": 1.0, "steps": 1, "vae_tile": 64}
    image = photograph(32, 64)
    one, other = (loaded().restore(image, ["the cat", right], **options).astype(int) for right in ("a", "sat sat"))
    apart = np.abs(one - other).max(axis=(0, 2))
    assert apart[96:].max() > 1
    assert apart[:32].max() == 0


@pytest.mark.parametrize(
    ("captions", "given", "message"),
    [
        (
            ["a", "b", "c"],
            {},
            r"^caption is a list of 3: must be one text, or 2, one for each tile from left to right and then down: 2 "
            r"across \(pixels 0-32, 16-46\) and 1 down \(0-30\)$",
        ),
        ([], {}, "caption is a list of 0: must be one text, or 2, one for each tile"),
        (["a", "b"], {"progressive": True, "scale": 4}, "progressive is true: takes one caption for a picture, each"),
    ],
)
def test_captions_that_do_not_fit(captions, given, message):
    with pytest.raises(InputError, match=message):
        loaded().restore(photograph(*PICTURE), captions, **TILED | given)


def test_contexts_of_another_number_of_tiles(rng):
    array = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    with pytest.raises(InputError, match=r"^context is of 3 tiles: must be of one or 2$"):
        loaded().sample(
            array(1, 8, 12, 32), array(1, 3, 5, 40), array(1, 3, 20), None, None, array(1, 8, 12, 4), guidance=1, tile=8
        )
