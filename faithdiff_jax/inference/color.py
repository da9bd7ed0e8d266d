"""Colour fixes: lend a restored image the colours of the upscaled input. Pure functions, fit for jit."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from faithdiff_jax.inference.options import COLOR_FIXES, WAVELET_LEVELS

Images = Float[Array | np.ndarray, "b h w c"]
Reference = Float[Array | np.ndarray, "..."]  # of the images' shape; another one is refused by name

# The published 1e-5 belongs to variances of images in [0, 1]; in [-1, 1] they are four times as large.
_VARIANCE_EPSILON = 4 * 1e-5


def fix_color(
    image: Images, reference: Reference, method: str, levels: int = WAVELET_LEVELS
) -> Float[Array | np.ndarray, "b h w c"]:
    """Apply a colour fix by name: "adain" (the published default), "wavelet" or "none".

    Both arrays are (B, H, W, C) in [-1, 1], `reference` the upscaled input; the result is float32 of that shape,
    except for "none", which hands `image` back. It is not clipped. `levels` is for "wavelet". The published script
    (FaithDiff, test code taken from StableSR's wavelet_color_fix) fixes the image after it was clipped and rounded to
    8 bits.
    Raises ValueError for another name or for shapes that differ.
    """
    if method not in COLOR_FIXES:
        raise ValueError(f"color fix {method!r}: must be one of {', '.join(COLOR_FIXES)}")
    if method == "none":
        return image
    return adain(image, reference) if method == "adain" else wavelet(image, reference, levels)


def adain(image: Images, reference: Reference) -> Float32[Array, "b h w c"]:
    """Give each channel of each image the reference's mean and standard deviation over its pixels.

    Shapes (B, H, W, C), ranges [-1, 1]; float32 result. Variances are divided by H * W - 1 and then grow by 1e-5
    (in [0, 1] units) in both images, as in the published calc_mean_std. Raises ValueError for shapes that differ.
    """
    ours, theirs = _same_shape_float32(image, reference)
    mean, deviation = _statistics(ours)
    wanted_mean, wanted_deviation = _statistics(theirs)
    return (ours - mean) / deviation * wanted_deviation + wanted_mean


def wavelet(image: Images, reference: Reference, levels: int = WAVELET_LEVELS) -> Float32[Array, "b h w c"]:
    """Keep the image's high frequencies and take the low ones from the reference, by an a-trous decomposition.

    Shapes (B, H, W, C), float32 result; any range, since the filters keep constants. Level i smooths with the 3x3
    binomial kernel dilated by 2**i, edges replicated (StableSR's wavelet_decomposition). `levels` is static under jit.
    Raises ValueError for shapes that differ.
    """
    ours, theirs = _same_shape_float32(image, reference)
    # The details of all levels sum to (image - its lowest band), and smoothing is linear: so one chain, over the
    # difference of the two, yields image - low(image) + low(reference).
    difference = theirs - ours
    for level in range(levels):
        difference = _smooth(difference, 2**level)
    return ours + difference


def _same_shape_float32(image: Images, reference: Reference) -> tuple[jax.Array, jax.Array]:
    if image.shape != reference.shape or image.ndim != 4:
        raise ValueError(f"image {image.shape} and reference {reference.shape} must share one (B, H, W, C) shape")
    return jnp.asarray(image, jnp.float32), jnp.asarray(reference, jnp.float32)


def _statistics(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation over H and W, each (B, 1, 1, C)."""
    variance = jnp.var(image, axis=(1, 2), ddof=1, keepdims=True)
    return jnp.mean(image, axis=(1, 2), keepdims=True), jnp.sqrt(variance + _VARIANCE_EPSILON)


def _smooth(image: jax.Array, dilation: int) -> jax.Array:
    """Filter with [1, 2, 1] / 4 down and across, the taps `dilation` apart: the binomial kernel, separated."""
    for axis in (1, 2):
        side = image.shape[axis]
        padding = [(dilation, dilation) if axis == padded else (0, 0) for padded in range(4)]
        padded_image = jnp.pad(image, padding, mode="edge")
        before, after = (
            jax.lax.slice_in_dim(padded_image, start, start + side, axis=axis) for start in (0, 2 * dilation)
        )
        image = before / 4 + image / 2 + after / 4
    return image
