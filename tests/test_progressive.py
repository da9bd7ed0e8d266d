"""Enlarging in passes of at most 2: each is a restoration of the one before."""

import numpy as np
import pytest
from converted import loaded
from test_pipeline import photograph

from faithdiff_jax.cli.command import Parser
from faithdiff_jax.cli.restore_flags import add_flags
from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.inference.restoration import Request, restore_all


@pytest.mark.parametrize(
    ("scale", "passes"), [(1, (1,)), (2, (2,)), (3, (2, 1.5)), (4, (2, 2)), (5, (2, 2, 1.25)), (32, (2,) * 5)]
)
def test_scales_of_the_passes(scale, passes):
    assert RestoreOptions(scale=scale, progressive=True).enlargements == passes
    assert RestoreOptions(scale=scale).enlargements == (scale,)


def test_two_passes_are_two_restorations():
    model, image = loaded(), photograph(11, 13)
    options = {"steps": 2, "multiple": 64, "seed": 3}
    seen = []
    once = model.restore(image, "the cat", scale=2, **options)
    twice = model.restore(once, "the cat", scale=2, **options)
    found = model.restore(
        image, "the cat", scale=4, progressive=True, on_step=lambda *at: seen.append(at[:2]), **options
    )
    assert found.shape == (44, 52, 3)
    assert np.abs(found.astype(int) - twice).max() <= 1  # with a look after every step: another program
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    one = Request(image=image, caption="the cat")
    (restored,) = restore_all(model, [one], RestoreOptions(scale=4, progressive=True, **options))
    np.testing.assert_array_equal(restored.image, twice)
    assert set(restored.seconds) == {"encode", "denoise", "decode"}
    with pytest.raises(InputError, match=r"^progressive is true: takes a seed, not noise"):
        model.restore(image, scale=4, progressive=True, noise={})


def test_the_flag():
    parser = Parser("")
    add_flags(parser)
    given = ["--input", "a", "--output", "b"]
    assert not hasattr(parser.parse_args(given), "progressive")
    assert parser.parse_args([*given, "--progressive"]).progressive is True
    assert parser.parse_args([*given, "--no-progressive"]).progressive is False  # where a model has it as its default
    for value in (1, "true", None):
        with pytest.raises(InputError, match=r"^progressive is .*: must be true or false"):
            RestoreOptions(progressive=value)
