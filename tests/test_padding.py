"""Pictures padded to sizes that they share: what they share, and what of a picture the padding leaves as it is."""

import jax
import numpy as np
import pytest
import skimage.data
from converted import loaded
from parity import assert_parity

from faithdiff_jax.files import images
from faithdiff_jax.inference.canvas import Canvas
from faithdiff_jax.inference.color import fix_color
from faithdiff_jax.inference.inputs import drawn_noise, noise_shapes
from faithdiff_jax.inference.options import COLOR_FIXES, RestoreOptions
from faithdiff_jax.inference.programs import Program

OPTIONS = {"scale": 2, "steps": 2, "multiple": 64}


def photograph(height: int, width: int) -> np.ndarray:
    return np.ascontiguousarray(skimage.data.astronaut()[60 : 60 + height, 180 : 180 + width])


def test_noise_is_that_of_the_picture_without_padding():
    """Bit for bit what `jax.random.normal` draws, whatever is padded, and by a program that sizes share."""
    model = loaded()
    options = RestoreOptions(scale=1, multiple=64, sampler="ddpm", steps=3)
    canvas = Canvas.of(photograph(43, 51), options, model.config)
    assert (canvas.exact_size, canvas.size) == ((48, 56), (64, 64))
    exact = noise_shapes(options, model.config, canvas.exact_size)
    padded = noise_shapes(options, model.config, canvas.size)
    alone = drawn_noise(exact, 7, model.programs.normal, (6, 7))
    shared = drawn_noise(padded, 7, model.programs.normal, (6, 7))
    assert set(alone) == {"start", "encode", "steps"}
    for i, (name, shape) in enumerate(exact.items()):
        drawn = jax.random.normal(jax.random.fold_in(jax.random.key(7), i), shape)
        np.testing.assert_array_equal(alone[name], drawn)
        np.testing.assert_array_equal(shared[name][..., :6, :7, :], drawn)
        assert shared[name].shape == padded[name]
        rest = np.concatenate([shared[name][..., 6:, :, :].ravel(), shared[name][..., :6, 7:, :].ravel()])
        assert 0.8 < rest.std() < 1.2
        assert not np.isin(rest, drawn).any()


def test_what_lies_in_the_padding():
    """As published up to whole latent pixels; from there on mirrored, several times if need be."""
    model, image = loaded(), photograph(13, 61)
    exact = Canvas.of(image, RestoreOptions(scale=1), model.config).padded()[0]
    padded = Canvas.of(image, RestoreOptions(scale=1, multiple=64), model.config).padded()[0]
    assert (exact.shape, padded.shape) == ((16, 64, 3), (64, 64, 3))
    np.testing.assert_array_equal(exact[12:], np.repeat(exact[12:13], 4, axis=0))
    np.testing.assert_array_equal(padded, np.concatenate([exact, exact[::-1], exact, exact[::-1]]))


@pytest.mark.parametrize("method", COLOR_FIXES)
def test_colours_are_those_of_the_picture_without_padding(rng, method):
    sizes = np.array([[37, 53], [16, 64]], np.int32)
    ours, theirs = rng.uniform(-1, 1, (2, 2, 48, 64, 3)).astype(np.float32)
    fixed = np.asarray(jax.jit(fix_color, static_argnums=(2, 3))(ours, theirs, method, 6, sizes))
    for i, (height, width) in enumerate(sizes):
        inside = (slice(i, i + 1), slice(height), slice(width))
        assert_parity(fixed[inside], fix_color(ours[inside], theirs[inside], method, 6), 1e-6)


def test_rows_of_the_padded_picture():
    for multiple, scale in ((None, 2), (64, 1), (64, 3)):
        canvas = Canvas.of(photograph(13, 61), RestoreOptions(scale=scale, multiple=multiple), loaded().config)
        height = canvas.size[0]
        rows = [canvas.padded_rows(row, min(row + 11, height)) for row in range(0, height, 11)]
        np.testing.assert_array_equal(images.to_float(np.concatenate(rows)), canvas.padded()[0])


def test_pictures_of_one_padded_size_share_every_program():
    model = loaded()
    model.restore(photograph(20, 27), **OPTIONS)
    programs = [one for one in vars(model.programs).values() if isinstance(one, Program)]
    before = [set(one._compiled) for one in programs]
    for size in ((28, 30), (17, 32), (31, 19)):
        assert model.restore(photograph(*size), **OPTIONS).shape == (2 * size[0], 2 * size[1], 3)
    new = [one.function.__name__ for one, known in zip(programs, before, strict=True) if set(one._compiled) - known]
    assert set(new) <= {"normal"}  # one for each power of two
    for one, known in zip(programs, before, strict=True):
        assert len(set(one._compiled) - known) <= 1


def test_a_picture_that_fits_is_restored_as_without_padding():
    model, image = loaded(), photograph(32, 64)
    exact = model.restore(image, **OPTIONS | {"multiple": None})
    np.testing.assert_array_equal(model.restore(image, **OPTIONS), exact)
