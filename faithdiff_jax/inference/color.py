"""Colour fixes: lend a restored image the colours of the upscaled input. Pure functions, fit for jit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int, Int64, UInt8

from faithdiff_jax.files import images
from faithdiff_jax.inference.options import COLOR_FIXES, WAVELET_LEVELS

Images = Float[Array | np.ndarray, "b h w c"]
Reference = Float[Array | np.ndarray, "..."]  # of the images' shape; another one is refused by name

Sizes = Int[Array | np.ndarray, "b 2"]

# The published 1e-5 belongs to variances of images in [0, 1]; in [-1, 1] they are four times as large.
_VARIANCE_EPSILON = 4 * 1e-5
_LEVELS = images.to_float(np.arange(256, dtype=np.uint8)).astype(np.float64)[None]


@dataclasses.dataclass(frozen=True)
class Tint:
    """Other colours for a reference: each channel times `gain`, plus `offset`; in [-1, 1] before, about so after."""

    gain: Float32[np.ndarray, " c"]
    offset: Float32[np.ndarray, " c"]

    def __call__(self, image: Float[np.ndarray, "*n c"]) -> Float[np.ndarray, "*n c"]:
        """The image in these colours."""
        tinted: np.ndarray = image * self.gain + self.offset
        return tinted


def fix_color(
    image: Images, reference: Reference, method: str, levels: int = WAVELET_LEVELS, sizes: Sizes | None = None
) -> Float[Array | np.ndarray, "b h w c"]:
    """Apply a colour fix by name: "adain" (the published default), "wavelet" or "none".

    Both arrays are (B, H, W, C) in [-1, 1], `reference` the upscaled input; the result is float32 of that shape,
    except for "none", which hands `image` back. It is not clipped. `levels` is for "wavelet". `sizes` are the heights
    and widths (B, 2) of the images in their padding: what lies right of and below them is left out of account. The
    published script (FaithDiff, test code taken from StableSR's wavelet_color_fix) fixes the image after it was clipped
    and rounded to 8 bits.
    Raises ValueError for another name or for shapes that differ.
    """
    if method not in COLOR_FIXES:
        raise ValueError(f"color fix {method!r}: must be one of {', '.join(COLOR_FIXES)}")
    if method == "none":
        return image
    return adain(image, reference, sizes) if method == "adain" else wavelet(image, reference, levels, sizes)


def adain(image: Images, reference: Reference, sizes: Sizes | None = None) -> Float32[Array, "b h w c"]:
    """Give each channel of each image the reference's mean and standard deviation over its pixels.

    Shapes (B, H, W, C), ranges [-1, 1]; float32 result. Variances are divided by H * W - 1 and then grow by 1e-5
    (in [0, 1] units) in both images, as in the published calc_mean_std. `sizes`: see `fix_color`. Raises ValueError for
    shapes that differ.
    """
    ours, theirs = _same_shape_float32(image, reference)
    inside = None if sizes is None else _inside(ours, sizes)
    mean, deviation = _statistics(ours, inside)
    wanted_mean, wanted_deviation = _statistics(theirs, inside)
    return (ours - mean) / deviation * wanted_deviation + wanted_mean


def adain_levels(
    counts: Int[np.ndarray, "c 256"], wanted: Int[np.ndarray, "c 256"], tint: Tint | None = None
) -> UInt8[np.ndarray, "c 256"]:
    """`adain` of pictures at eight bits that are too large to hold: what each channel's 256 levels become.

    `counts` says how often each channel of the picture has each level, `wanted` the same of the reference, in whose
    place `tint` puts one of other colours. Statistics are exact here; in float32, a level that is near the middle
    between two may become the other one.
    """
    (mean, deviation), (wanted_mean, wanted_deviation) = level_statistics(counts), level_statistics(wanted, tint)
    levels = (_LEVELS - mean[:, None]) / deviation[:, None] * wanted_deviation[:, None] + wanted_mean[:, None]
    return images.to_uint8(levels)


def level_counts(levels: UInt8[np.ndarray, "h w c"]) -> Int64[np.ndarray, "c 256"]:
    """How often each channel of (H, W, C) has each of the 256 levels."""
    return np.stack([np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(levels, -1, 0)])


def level_statistics(
    counts: Int[np.ndarray, "c 256"], tint: Tint | None = None
) -> tuple[Float64[np.ndarray, " c"], Float64[np.ndarray, " c"]]:
    """From `level_counts`: mean and standard deviation of each channel in [-1, 1], as `adain` takes them."""
    values = np.repeat(_LEVELS, len(counts), axis=0)
    if tint is not None:
        values = tint(values.T).T
    pixels = counts.sum(axis=1)
    mean = (counts * values).sum(axis=1) / pixels
    variance = (counts * (values - mean[:, None]) ** 2).sum(axis=1) / np.maximum(pixels - 1, 1)
    return mean, np.sqrt(variance + _VARIANCE_EPSILON)


def wavelet(
    image: Images, reference: Reference, levels: int = WAVELET_LEVELS, sizes: Sizes | None = None
) -> Float32[Array, "b h w c"]:
    """Keep the image's high frequencies and take the low ones from the reference, by an a-trous decomposition.

    Shapes (B, H, W, C), float32 result; any range, since the filters keep constants. Level i smooths with the 3x3
    binomial kernel dilated by 2**i, edges replicated (StableSR's wavelet_decomposition). `levels` is static under jit.
    `sizes`: see `fix_color`; the edges are then those of the images in their padding. Raises ValueError for shapes that
    differ.
    """
    ours, theirs = _same_shape_float32(image, reference)
    # The details of all levels sum to (image - its lowest band), and smoothing is linear: so one chain, over the
    # difference of the two, yields image - low(image) + low(reference).
    difference = theirs - ours
    for level in range(levels):
        difference = _smooth(difference, 2**level) if sizes is None else _smooth_inside(difference, 2**level, sizes)
    return ours + difference


def _same_shape_float32(image: Images, reference: Reference) -> tuple[jax.Array, jax.Array]:
    if image.shape != reference.shape or image.ndim != 4:
        raise ValueError(f"image {image.shape} and reference {reference.shape} must share one (B, H, W, C) shape")
    return jnp.asarray(image, jnp.float32), jnp.asarray(reference, jnp.float32)


def _inside(images: jax.Array, sizes: Sizes) -> jax.Array:
    """(B, H, W, 1), 1 where a pixel lies in the image and 0 in its padding."""
    rows, columns = (jnp.arange(side)[None] < sizes[:, axis, None] for axis, side in enumerate(images.shape[1:3]))
    return (rows[:, :, None] & columns[:, None, :])[..., None].astype(jnp.float32)


def _statistics(image: jax.Array, inside: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation over H and W, or what lies inside, each (B, 1, 1, C)."""
    if inside is None:
        variance = jnp.var(image, axis=(1, 2), ddof=1, keepdims=True)
        return jnp.mean(image, axis=(1, 2), keepdims=True), jnp.sqrt(variance + _VARIANCE_EPSILON)
    total = functools.partial(jnp.sum, axis=(1, 2), keepdims=True)
    count = total(inside)
    mean = total(image * inside) / count
    variance = total(jnp.square(image - mean) * inside) / (count - 1)
    return mean, jnp.sqrt(variance + _VARIANCE_EPSILON)


def _smooth(image: jax.Array, dilation: int, axes: tuple[int, ...] = (1, 2)) -> jax.Array:
    """Filter with [1, 2, 1] / 4 down and across, the taps `dilation` apart: the binomial kernel, separated."""
    for axis in axes:
        side = image.shape[axis]
        padding = [(dilation, dilation) if axis == padded else (0, 0) for padded in range(4)]
        padded_image = jnp.pad(image, padding, mode="edge")
        before, after = (
            jax.lax.slice_in_dim(padded_image, start, start + side, axis=axis) for start in (0, 2 * dilation)
        )
        image = before / 4 + image / 2 + after / 4
    return image


def _smooth_inside(images: jax.Array, dilation: int, sizes: Sizes) -> jax.Array:
    """`_smooth` of images in their padding, into which their own last row and column are repeated before."""
    for axis in (1, 2):
        last = jnp.asarray(sizes)[:, axis - 1].reshape(-1, 1, 1, 1) - 1
        edge = jnp.take_along_axis(images, last, axis=axis)
        here = jax.lax.broadcasted_iota(jnp.int32, images.shape, axis)
        images = _smooth(jnp.where(here > last, edge, images), dilation, (axis,))
        # Fused into one, every level would compute the ones before it again and again.
        images = jax.lax.optimization_barrier(images)
    return images
