"""The colour fixes against their definitions, written in torch on images in [0, 1] as published."""

import jax
import numpy as np
import pytest
import torch
from parity import assert_parity, nchw, nhwc

from faithdiff_jax.inference.color import adain, fix_color, wavelet
from faithdiff_jax.inference.options import COLOR_FIXES


@pytest.fixture
def pair(rng):
    """Two (2, 37, 53, 3) images in [-1, 1], one of them flat enough for the epsilon to count."""
    image = rng.uniform(-1, 1, (2, 37, 53, 3)).astype(np.float32)
    reference = rng.uniform(-0.6, 0.9, (2, 37, 53, 3)).astype(np.float32)
    image[1] = 0.2 + 0.004 * image[1]
    reference[:, :, 20:] *= 0.5
    return image, reference


def unit(image) -> torch.Tensor:
    return nchw(image).double() / 2 + 0.5


def signed(tensor: torch.Tensor) -> np.ndarray:
    return nhwc(tensor * 2 - 1)


def torch_adain(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    def statistics(x):
        variance = torch.var(x, dim=(2, 3), correction=1, keepdim=True)
        return x.mean(dim=(2, 3), keepdim=True), (variance + 1e-5).sqrt()

    mean, deviation = statistics(image)
    reference_mean, reference_deviation = statistics(reference)
    return (image - mean) / deviation * reference_deviation + reference_mean


def torch_wavelet(image: torch.Tensor, reference: torch.Tensor, levels: int) -> torch.Tensor:
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=image.dtype) / 16

    def decompose(x):
        high = torch.zeros_like(x)
        for level in range(levels):
            reach = 2**level
            padded = torch.nn.functional.pad(x, (reach,) * 4, mode="replicate")
            low = torch.nn.functional.conv2d(padded, kernel.expand(3, 1, 3, 3), groups=3, dilation=reach)
            high, x = high + (x - low), low
        return high, x

    return decompose(image)[0] + decompose(reference)[1]


def test_adain_matches_its_definition(pair):
    image, reference = pair
    assert_parity(adain(image, reference), signed(torch_adain(unit(image), unit(reference))), 2e-6)


def test_adain_divides_by_one_less_than_the_pixels(rng):
    image, reference = rng.uniform(-1, 1, (2, 1, 3, 3, 3)).astype(np.float32)
    image *= 0.01
    assert_parity(adain(image, reference), signed(torch_adain(unit(image), unit(reference))), 2e-6)


@pytest.mark.parametrize("levels", [1, 5])
def test_wavelet_matches_its_definition(pair, levels):
    image, reference = pair
    ours = jax.jit(wavelet, static_argnames="levels")(image, reference, levels=levels)
    assert_parity(ours, signed(torch_wavelet(unit(image), unit(reference), levels)), 1e-6)


def test_wavelet_reaches_beyond_a_small_image(rng):
    image, reference = rng.uniform(-1, 1, (2, 1, 8, 9, 3)).astype(np.float32)
    assert_parity(wavelet(image, reference), signed(torch_wavelet(unit(image), unit(reference), 5)), 1e-6)


@pytest.mark.parametrize("method", COLOR_FIXES)
def test_images_of_a_batch_do_not_mix(pair, method):
    image, reference = pair
    fix = jax.jit(fix_color, static_argnames="method")
    both = fix(image, reference, method=method)
    for i in range(2):
        alone = fix(image[i : i + 1], reference[i : i + 1], method=method)
        np.testing.assert_allclose(both[i], alone[0], atol=1e-6)


@pytest.mark.parametrize("method", COLOR_FIXES)
def test_an_image_that_is_its_own_reference_stays(pair, method):
    image, _ = pair
    np.testing.assert_allclose(fix_color(image, image, method), image, atol=1e-6)


def test_a_flat_image_takes_the_reference_colour():
    image = np.full((1, 9, 11, 3), -0.25, np.float32)
    reference = np.broadcast_to(np.float32([0.5, 0, -0.5]), (1, 9, 11, 3))
    for method in ("adain", "wavelet"):
        np.testing.assert_allclose(fix_color(image, reference, method), reference, atol=1e-6)


def test_fewer_levels_keep_less_of_the_image(pair):
    image, reference = pair
    distance = [np.abs(fix_color(image, reference, "wavelet", levels) - reference).mean() for levels in (5, 3, 1)]
    assert distance[0] > distance[1] > distance[2]
    np.testing.assert_array_equal(fix_color(image, reference, "wavelet", 3), wavelet(image, reference, 3))


def test_unknown_method_and_unequal_shapes_are_named(pair):
    image, reference = pair
    with pytest.raises(ValueError, match=r"'hue'.*adain, wavelet, none"):
        fix_color(image, reference, "hue")
    with pytest.raises(ValueError, match="share one"):
        adain(image, reference[:, 1:])
    with pytest.raises(ValueError, match="share one"):
        wavelet(image, reference[:1])
