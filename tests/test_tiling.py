"""Grids and weights against restatements of the published ones; cross-fades against diffusers' tiled autoencoder."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from parity import assert_parity, nchw, nhwc

from faithdiff_jax.inference.grid import latent_grid
from faithdiff_jax.inference.tiling import blend_tiles, fade_tiles, gather_tiles, gaussian_weights


def walked_grid(height, width, tile, overlap):
    """The published walk over rows and columns, step by step."""

    def starts(side):
        size = min(tile, side)
        count = (side - 1) // size + 1
        step = size if count == 1 else math.ceil(size * overlap)
        found, at, last = [], 0, False
        while at < side and not last:
            if at + size >= side:
                at, last = side - size, True
            found.append(at)
            at += step
        return found

    return tuple((i, j) for i in starts(height) for j in starts(width))


@pytest.mark.parametrize("tile", [1, 5, 16, 128])
@pytest.mark.parametrize("overlap", [0.1, 0.5, 0.61, 1.0])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 16), (16, 17), (33, 31), (40, 129)])
def test_grid_is_the_published_walk(height, width, tile, overlap):
    grid = latent_grid(height, width, tile, overlap)
    assert grid == walked_grid(height, width, tile, overlap)
    assert len(set(grid)) == len(grid)
    covered = np.zeros((height, width), bool)
    for top, left in grid:
        assert 0 <= top <= height - min(tile, height)
        assert 0 <= left <= width - min(tile, width)
        covered[top : top + tile, left : left + tile] = True
    assert covered.all()


def test_grid_by_hand():
    assert latent_grid(128, 128, 128, 0.5) == ((0, 0),)
    assert latent_grid(96, 200, 128, 0.5) == ((0, 0), (0, 64), (0, 72))
    assert latent_grid(256, 128, 128, 1.0) == ((0, 0), (128, 0))
    assert len(latent_grid(512, 512, 128, 0.5)) == 49
    assert latent_grid(12, 7, 5, 0.5) == tuple((i, j) for i in (0, 3, 6, 7) for j in (0, 2))


@pytest.mark.parametrize("overlap", [0, -0.5, 1.01, math.nan])
def test_grid_refuses_a_stride_fraction_out_of_range(overlap):
    with pytest.raises(ValueError, match="stride fraction"):
        latent_grid(10, 10, 5, overlap)


def test_grid_refuses_empty_sizes():
    with pytest.raises(ValueError, match="tile 0"):
        latent_grid(10, 10, 0, 0.5)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 12), (128, 128)])
def test_gaussian_weights_follow_the_formula(height, width):
    def bell(at, middle, side):
        return math.exp(-((at - middle) ** 2) / (side * side) / (2 * 0.01)) / math.sqrt(2 * math.pi * 0.01)

    expected = [
        [bell(y, height / 2, height) * bell(x, (width - 1) / 2, width) for x in range(width)] for y in range(height)
    ]
    weights = gaussian_weights(height, width)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, np.float32(expected), rtol=1e-6)
    assert weights.min() > 0
    np.testing.assert_array_equal(weights, weights[:, ::-1])
    assert not np.allclose(weights, weights[::-1])


@pytest.fixture
def image(rng):
    return rng.standard_normal((2, 33, 45, 4)).astype(np.float32)


CORNERS = latent_grid(33, 45, 16, 0.5)


def test_gather_cuts_at_the_corners(image):
    tiles = jax.jit(gather_tiles, static_argnums=(1, 2, 3))(image, CORNERS, 16, 16)
    assert tiles.shape == (len(CORNERS), 2, 16, 16, 4)
    for tile, (top, left) in zip(tiles, CORNERS, strict=True):
        np.testing.assert_array_equal(tile, image[:, top : top + 16, left : left + 16])


def test_blend_undoes_gather(image):
    @jax.jit
    def there_and_back(x):
        return blend_tiles(gather_tiles(x, CORNERS, 16, 16), CORNERS, gaussian_weights(16, 16), 33, 45)

    np.testing.assert_allclose(there_and_back(image), image, rtol=2e-6, atol=1e-6)


def test_blend_is_the_weighted_mean(rng):
    tiles = rng.standard_normal((len(CORNERS), 2, 16, 16, 4)).astype(np.float32)
    weights = gaussian_weights(16, 16)
    total, weight = np.zeros((2, 33, 45, 4)), np.zeros((33, 45, 1))
    for tile, (top, left) in zip(tiles, CORNERS, strict=True):
        total[:, top : top + 16, left : left + 16] += tile * weights[:, :, None].astype(np.float64)
        weight[top : top + 16, left : left + 16] += weights[:, :, None]
    assert_parity(blend_tiles(tiles, CORNERS, weights, 33, 45), total / weight, 1e-6)


def test_blend_keeps_a_constant_and_the_dtype():
    tiles = jnp.full((len(CORNERS), 1, 16, 16, 2), 0.7109375, jnp.bfloat16)
    blended = blend_tiles(tiles, CORNERS, gaussian_weights(16, 16), 33, 45)
    assert blended.dtype == jnp.bfloat16
    assert (blended == tiles[0, 0, 0, 0, 0]).all()


def test_tiles_outside_the_array_are_refused(image):
    with pytest.raises(ValueError, match=r"at \(18, 0\) lies outside 33x45"):
        gather_tiles(image, ((18, 0),), 16, 16)
    with pytest.raises(ValueError, match="lies outside"):
        blend_tiles(jnp.zeros((1, 2, 16, 16, 4)), ((0, 30),), gaussian_weights(16, 16), 33, 45)
    with pytest.raises(ValueError, match="do not go with 2 corners"):
        blend_tiles(jnp.zeros((1, 2, 16, 16, 4)), ((0, 0), (1, 1)), gaussian_weights(16, 16), 33, 45)


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    """Random weights, a reduction of 4, tiles of 32 image pixels and 8 latent pixels."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        sample_size=32,
    ).eval()
    vae.requires_grad_(False)
    vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor = 32, 8, 0.25
    vae.enable_tiling()
    return vae


# Latent sizes: several tiles each way with a sliver last, one row, one column, whole strides, one tile.
SIZES = [(19, 23), (13, 25), (8, 20), (21, 5), (12, 18), (8, 7)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_fade_decodes_as_diffusers(autoencoder, rng, height, width):
    latent = rng.standard_normal((2, height, width, 4)).astype(np.float32)
    shapes = set()

    def decode(part):
        shapes.add(part.shape)
        return nhwc(autoencoder.decoder(autoencoder.post_quant_conv(nchw(part))))

    ours = fade_tiles(decode, latent, tile=8, out_tile=32)
    assert_parity(ours, nhwc(autoencoder.decode(nchw(latent)).sample), 1e-6)
    assert len(shapes) <= 9
    if max(height, width) <= 8:
        assert shapes == {latent.shape}


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_fade_encodes_as_diffusers(autoencoder, rng, height, width):
    images = rng.uniform(-1, 1, (2, 4 * height, 4 * width, 3)).astype(np.float32)

    def encode(part):
        return nhwc(autoencoder.quant_conv(autoencoder.encoder(nchw(part))))

    ours = fade_tiles(encode, images, tile=32, out_tile=8)
    assert_parity(ours, nhwc(autoencoder.encode(nchw(images)).latent_dist.parameters), 1e-6)


@pytest.mark.parametrize(("tile", "overlap"), [(16, 0.5), (8, 0.0), (20, 0.25), (16, 0.75)])
def test_fade_follows_other_overlaps(autoencoder, rng, monkeypatch, tile, overlap):
    latent = rng.standard_normal((1, 29, 43, 4)).astype(np.float32)
    monkeypatch.setattr(autoencoder, "tile_sample_min_size", 4 * tile)
    monkeypatch.setattr(autoencoder, "tile_latent_min_size", tile)
    monkeypatch.setattr(autoencoder, "tile_overlap_factor", overlap)
    published = nhwc(autoencoder.decode(nchw(latent)).sample)

    def decode(part):
        return nhwc(autoencoder.decoder(autoencoder.post_quant_conv(nchw(part))))

    ours = fade_tiles(decode, latent, tile=tile, out_tile=4 * tile, overlap=overlap)
    assert_parity(ours, published, 1e-6)


def test_fade_takes_device_arrays_and_leaves_its_input(rng):
    array = rng.standard_normal((1, 19, 21, 3)).astype(np.float32)
    kept = array.copy()
    for given in (array, jnp.asarray(array)):
        np.testing.assert_allclose(fade_tiles(lambda part: part, given, tile=8, out_tile=8), kept, atol=1e-6)
    np.testing.assert_array_equal(array, kept)
    doubled = fade_tiles(lambda part: jnp.asarray(part, jnp.bfloat16), array, tile=8, out_tile=8)
    assert doubled.dtype == np.float32


def test_fade_refuses_sizes_that_do_not_meet():
    array = np.zeros((1, 30, 30, 1), np.float32)
    with pytest.raises(ValueError, match="whole stride"):
        fade_tiles(lambda part: part, array, tile=10, out_tile=80)
    with pytest.raises(ValueError, match="not a whole size"):
        fade_tiles(lambda part: part, array, tile=16, out_tile=4)
    with pytest.raises(ValueError, match=r"should be \(16, 16\)"):
        fade_tiles(lambda part: part, array, tile=8, out_tile=16)
    with pytest.raises(ValueError, match="overlap 1"):
        fade_tiles(lambda part: part, array, tile=8, out_tile=8, overlap=1)
