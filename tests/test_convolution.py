"""Convolutions by Winograd against XLA's own and PyTorch's, both gradients too, and what is chosen when."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from parity import assert_parity, nchw, nhwc

from faithdiff_jax.models import winograd
from faithdiff_jax.models.backend import trace_for
from faithdiff_jax.models.convolution import ALGORITHMS, choose, convolve, use_algorithm
from faithdiff_jax.models.layers import Layers
from faithdiff_jax.planning.flops import count

TILE_SIZES = (2, 4)
NUMBERS = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape, np.float32))


def direct(x, kernel):
    with use_algorithm("direct"):
        return convolve(x, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=NUMBERS)


@pytest.mark.parametrize("m", TILE_SIZES)
def test_the_transforms_are_exact(rng, m):
    """In float64, whose rounding is far below any mistake in a point or a coefficient."""
    a, g, b = winograd.matrices(m)
    taps, signal = rng.standard_normal(3), rng.standard_normal(m + 2)
    np.testing.assert_allclose(a @ ((g @ taps) * (b @ signal)), np.correlate(signal, taps), rtol=1e-12)


@pytest.mark.parametrize("m", TILE_SIZES)
@pytest.mark.parametrize("shape", [(2, 13, 17, 5), (1, 1, 1, 3), (1, 3, 200, 2), (1, 65, 64, 3)])
def test_convolution_and_both_gradients(rng, shape, m):
    """Whole and in strips, with sides that are no multiple of a tile."""
    x, kernel = normal(rng, *shape), normal(rng, 3, 3, shape[-1], 4)
    wanted, pull_wanted = jax.vjp(direct, x, kernel)
    found, pull_found = jax.vjp(lambda x, kernel: winograd.convolve(x, kernel, m), x, kernel)
    assert_parity(found, wanted, 2e-6)
    gradient = normal(rng, *wanted.shape)
    for ours, xla in zip(pull_found(gradient), pull_wanted(gradient), strict=True):
        assert_parity(ours, xla, 2e-6)


@pytest.mark.parametrize("m", TILE_SIZES)
def test_parity_with_pytorch(rng, m):
    x, kernel = normal(rng, 1, 24, 40, 96), normal(rng, 3, 3, 96, 64)
    theirs = torch.nn.functional.conv2d(nchw(x), torch.from_numpy(np.array(kernel.transpose(3, 2, 0, 1))), padding=1)
    assert_parity(winograd.convolve(x, kernel, m), nhwc(theirs), 5e-6)


@pytest.mark.parametrize("strips", [1, 3, 8])
def test_strips_change_nothing(rng, monkeypatch, strips):
    x, kernel = normal(rng, 1, 32, 32, 3), normal(rng, 3, 3, 3, 4)
    whole = direct(x, kernel)
    monkeypatch.setattr(winograd, "TILES_AT_ONCE", 64 // strips)
    jax.clear_caches()
    assert_parity(winograd.convolve(x, kernel, 4), whole, 2e-6)


def test_a_pixel_that_is_not_finite_spoils_its_neighbourhood_only():
    """The kernels wait for the picture's first pixel, whose value must not reach them."""
    x = jnp.ones((1, 16, 16, 2)).at[0, 0, 0, 0].set(jnp.inf)
    result = winograd.convolve(x, jnp.ones((3, 3, 2, 2)), 4)
    assert jnp.isfinite(result[:, 4:, 4:]).all()
    assert not jnp.isfinite(result[:, 0, 0]).any()


@pytest.mark.parametrize(
    ("shape", "outputs", "chosen"),
    [
        ((1, 512, 512, 128), 128, "winograd4"),
        ((1, 64, 64, 320), 320, "winograd4"),
        ((2, 32, 32, 1280), 640, "winograd4"),
        ((1, 16, 16, 1280), 1280, "winograd2"),
        ((1, 4, 4, 1280), 1280, "direct"),
        ((1, 512, 512, 3), 128, "direct"),
        ((1, 512, 512, 128), 3, "direct"),
    ],
)
def test_the_choice_on_cpu(shape, outputs, chosen):
    assert choose("cpu", shape, outputs, jnp.float32) == chosen
    assert choose("cpu", shape, outputs, jnp.bfloat16) == "direct"
    assert choose("cuda", shape, outputs, jnp.float32) == "direct"
    assert choose("tpu", shape, outputs, jnp.float32) == "direct"


def products(layer, x) -> bool:
    """Whether a convolution layer is traced as Winograd's."""
    return "winograd_convolution" in str(jax.make_jaxpr(layer)(x))


def test_layers_take_it_where_it_may_be_taken():
    make = Layers(nnx.Rngs(0))
    x = jnp.zeros((1, 32, 32, 128))
    assert products(make.conv3x3(128, 128), x)
    assert not products(make.conv3x3(128, 128, stride=2), x)
    assert not products(make.conv3x3(128, 128, padding=((0, 1), (0, 1))), x)
    assert not products(make.conv1x1(128, 128), x)
    assert not products(Layers(nnx.Rngs(0), dtype=jnp.bfloat16).conv3x3(128, 128), x)
    with trace_for("cuda"):
        assert not products(make.conv3x3(128, 128), x)
    with use_algorithm("direct"):
        assert not products(make.conv3x3(128, 128), x)


def test_an_unknown_algorithm_is_named():
    with pytest.raises(ValueError, match="algorithm 'fft': must be one of winograd4, winograd2, direct"):
        use_algorithm("fft")
    assert ALGORITHMS[-1] == "direct"


def test_it_counts_as_the_convolution_that_it_stands_for():
    x, kernel = jnp.zeros((2, 9, 7, 8)), jnp.zeros((3, 3, 8, 12))
    result = jnp.zeros((2, 9, 7, 12))

    def gradients(function):
        return lambda: jax.vjp(function, x, kernel)[1](result)

    by_winograd = lambda x, kernel: winograd.convolve(x, kernel, 4)  # noqa: E731
    assert count(by_winograd, x, kernel) == count(direct, x, kernel)
    assert count(gradients(by_winograd)) == count(gradients(direct))


def test_transformed_kernels_do_not_live_at_once():
    """Eight layers' kernels of 1280 channels, transformed, would take 0.8 GB; one at a time is a tenth of that."""
    kernels = [jax.ShapeDtypeStruct((3, 3, 1280, 1280), jnp.float32)] * 8

    def layers(x, kernels):
        for kernel in kernels:
            x = winograd.convolve(x, kernel, 2)
        return x

    compiled = jax.jit(layers).lower(jax.ShapeDtypeStruct((1, 16, 16, 1280), jnp.float32), kernels).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 16 * 1280**2 * 4
