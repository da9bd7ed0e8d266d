"""Decoding by tiles with the statistics of the whole picture: tiles that add up, and what exactly they give."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import assert_parity
from port import normal

from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.decoding import decode, decoded_pieces, merged, windows
from faithdiff_jax.inference.grid import least_tile
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.inference.programs import Program
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.norms import GroupNorm, Shared, sharing
from faithdiff_jax.models.vae import VAE, PixelAttention, VAEConfig

CONFIG = VAEConfig(channels=(8, 8), resnets_per_level=1, norm_groups=4)  # reaches 12 latent pixels
NORMS = 2 * 2 + 1 + 2 * 2 * 2 + 1  # two blocks, the attention, two blocks at each of two levels, the last one


@pytest.fixture(scope="module")
def model() -> types.SimpleNamespace:
    """What decoding asks of a `FaithDiff`: a decoder with random parameters, norms' too."""
    vae = VAE(CONFIG, rngs=nnx.Rngs(0))
    graph, state = nnx.split(vae)
    keys = iter(jax.random.split(jax.random.key(1), 200))
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), nnx.to_pure_dict(state))

    def plain(params, latents):
        return nnx.merge(graph, params).decode(latents)

    def norms(params, latents, given, rows, columns):
        with sharing(Shared(given, rows, columns)) as shared:
            plain(params, latents)
        return shared.found

    def normed(params, latents, given, rows, columns):
        with sharing(Shared(given, rows, columns)):
            return plain(params, latents)

    programs = types.SimpleNamespace(decode=Program(plain), norms=Program(norms), decode_normed=Program(normed))
    whole = lambda latents, vae_tile: programs.decode(params, latents)  # noqa: E731
    config = types.SimpleNamespace(vae=CONFIG)
    return types.SimpleNamespace(config=config, params={"vae": params}, programs=programs, decode=whole)


@pytest.mark.parametrize(("side", "tile"), [(40, 64), (64, 64), (65, 64), (100, 64), (1000, 90)])
def test_tiles_add_up(side, tile):
    total, own = np.zeros(side * 4), np.zeros(side)
    for window in windows(side, tile, 4, 9):
        size = min(side, tile)
        assert len(window.own) == size
        own[window.start : window.start + size] += window.own
        total[window.start * 4 : (window.start + size) * 4] += window.weights
        for end, at_edge in (
            (window.weights[:36], window.start == 0),
            (window.weights[-36:], window.start + size == side),
        ):
            assert (end == (1 if at_edge else 0)).all()  # what a tile's border has reached counts for nothing
    np.testing.assert_array_equal(own, 1)
    np.testing.assert_allclose(total, 1, atol=1e-6)
    with pytest.raises(ValueError, match=f"tile {least_tile(9) - 1} is too small for a reach of 9: must be at least"):
        windows(1000, least_tile(9) - 1, 4, 9)


def test_moments_of_tiles_are_those_of_the_whole(rng):
    """At twice the resolution of the tiles, of which the last and the first column are the other one's."""
    norm = GroupNorm(12, 3, epsilon=1e-6, use_fast_variance=False, rngs=nnx.Rngs(0))
    x, rows, found = jnp.asarray(normal(rng, 2, 12, 20, 12)) + 3, np.ones(6, np.float32), []
    tiles = ((slice(0, 12), np.float32([1, 1, 1, 1, 1, 0])), (slice(8, 20), np.float32([0, 1, 1, 1, 1, 1])))
    for place, columns in tiles:
        with sharing(Shared(None, rows, columns)) as shared:
            norm(x[:, :, place])
        found.append((float(columns.sum()), shared.found))
    with sharing(Shared(merged(found), rows, tiles[0][1])):
        part = norm(x[:, :, tiles[0][0]])
    assert_parity(part, norm(x)[:, :, tiles[0][0]], 1e-5)


def test_as_many_passes_as_norms_are_exact(model, rng, monkeypatch):
    """But for attention, which is left out here; and fewer come closer and closer."""
    monkeypatch.setattr(PixelAttention, "__call__", lambda self, x: x + self.group_norm(x))
    latents = jnp.asarray(normal(rng, 1, 87, 64, 4) + np.linspace(-3, 3, 87, dtype=np.float32)[None, :, None, None])
    whole = np.asarray(model.programs.decode.function(model.params["vae"], latents))
    away = []
    for passes in (1, 2, NORMS):
        options = RestoreOptions(vae_tile=128, decoder_passes=passes)
        away.append(np.abs(np.asarray(decode(model, latents, options)) - whole).max() / np.abs(whole).max())
    assert away[0] > 2 * away[1] > 20 * away[2]
    assert away[2] < 1e-5


def test_attention_is_all_that_tiles_change(model, rng):
    """What is decoded whole has attention over all of it."""
    latents = normal(rng, 1, 87, 64, 4)
    options = RestoreOptions(vae_tile=128, decoder_passes=2)
    found = [(top, left, piece.shape) for top, left, piece in decoded_pieces(model, latents, options)]
    assert found == [(0, 0, (1, 46, 128, 3)), (46, 0, (1, 128, 128, 3))]
    small = latents[:, :64]  # no larger than a tile: decoded at once
    np.testing.assert_array_equal(decode(model, small, options), model.decode(small, vae_tile=128))


def test_the_option():
    config = FaithDiffConfig()
    assert config.vae.decoder_reach == 18
    RestoreOptions(decoder_passes=2).check_against(config)
    with pytest.raises(
        InputError, match=r"^vae_tile is 704: must be at least 720 for this model, with decoder_passes$"
    ):
        RestoreOptions(decoder_passes=2, vae_tile=704).check_against(config)
