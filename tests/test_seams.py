"""The statistic that tells whether tiles can be seen: it finds seams that are there, and none where there are none."""

import numpy as np
import pytest

from benchmarks.seams import denoising_borders, gradient, jumps, latents_of, seam_test
from faithdiff_jax import SMALL_MODEL, FaithDiff
from faithdiff_jax.inference.grid import latent_grid
from faithdiff_jax.inference.options import RestoreOptions


def textured(rng, side=256):
    """A slope under a texture that is stronger in some places, as photographs have it."""
    texture = rng.standard_normal((side, side, 3)) * (1 + np.sin(np.arange(side) / 20))[:, None, None]
    return gradient(side) + 0.05 * texture


def test_a_slope_is_no_jump():
    assert np.nanmax(jumps(gradient(64), 0)) < 1e-12
    step = gradient(64) + (np.arange(64) >= 40)[:, None, None]
    assert np.nanargmax(jumps(step, 0)) == 40
    assert np.isclose(jumps(step, 0)[40], 1)
    assert np.isnan(jumps(step, 1)[[0, 1, -1]]).all()


def test_borders_of_denoising():
    options = RestoreOptions(tile=16, overlap=0.5)
    rows, columns = denoising_borders((256, 384), options, 8)
    assert rows == [64, 128, 192]
    assert columns == [64, 128, 192, 256, 320]
    assert {top for top, _ in latent_grid(32, 48, 16, 0.5)} == {0, 8, 16}


@pytest.mark.parametrize("tone", [0.0, 0.1])
def test_tones_of_tiles(rng, tone):
    """Tiles of 32 whose tones differ, under a texture."""
    tones = np.kron(rng.choice([-tone, tone], (8, 8)), np.ones((32, 32)))[..., None]
    borders = list(range(32, 256, 32))
    ratio, p = seam_test(textured(rng) + tones, (borders, borders), 4)
    assert (p < 0.01) == (tone > 0)
    assert (ratio > 1.05) == (tone > 0)


def test_tiles_of_the_small_model_overlap_enough():
    model = FaithDiff.load(SMALL_MODEL)
    latents = latents_of(model, gradient(128), 256)
    found = {}
    for overlap in (0.5, 1.0):
        options = model.defaults.replace(tile=16, overlap=overlap)
        decoded = np.asarray(model.decode(latents(options), vae_tile=256))[0]
        found[overlap] = seam_test(decoded, denoising_borders((256, 256), options, 4), 4)[1]
    assert found[0.5] > 0.05
    assert found[1.0] < 0.001
