"""Sensor noise of the degradation, on float32 images in 0..255.

Nothing here clips. Both kinds turn whole random numbers into noise through tables: many times as fast as NumPy's own
samplers, and the same for every release of NumPy whose integers are the same.
"""

from functools import lru_cache

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from scipy.special import ndtri, pdtr

# The guide's 256 * 2^11 numbers of two bytes fit a core's cache; with fewer, more pixels would need the slower search.
_CELL_BITS = 11
_REST_BITS = 32 - _CELL_BITS
_CELLS = 1 << _CELL_BITS
_NORMAL_STEPS = 1 << 16


def gaussian_noise(
    image: Float32[np.ndarray, "h w 3"], sigma: float, gray: bool, rng: np.random.Generator
) -> Float32[np.ndarray, "h w 3"]:
    """Draw Gaussian noise for an (H, W, 3) image: (H, W, 3) float32, the same in all channels if `gray`.

    `sigma` is the standard deviation in grey levels of 255. The distribution is the normal one in 65,536 equally
    likely steps: it ends at 4.3 sigma, and its steps are far finer than the 8 bits the image is rounded to.
    """
    steps = rng.integers(0, _NORMAL_STEPS, size=(*image.shape[:2], 1 if gray else 3), dtype=np.uint16)
    return _in_all_channels((_normal_quantiles() * np.float32(sigma)).take(steps))


def poisson_noise(
    image: Float32[np.ndarray, "h w 3"], scale: float, gray: bool, rng: np.random.Generator
) -> Float32[np.ndarray, "h w 3"]:
    """Draw shot noise for an (H, W, 3) float32 image: (H, W, 3), drawn from its luma for all channels if `gray`.

    With the image rounded to 8 bits, p in [0, 1], and V the number of its distinct levels rounded up to a power of
    two, the noise is `scale * 255 * (Poisson(V p) / V - p)`: its variance is `scale^2 255^2 p / V`. Levels are counted
    over all channels together, so a picture with few levels is noisier.

    Source: Real-ESRGAN's `generate_poisson_noise_pt`.
    """
    levels = to_uint8(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] if gray else image)
    values = 1 << (_distinct_levels(levels) - 1).bit_length()
    noise = _poisson_counts(levels, values, rng) * np.float32(255.0 / values)
    noise -= levels
    noise *= scale
    return _in_all_channels(noise)


def to_uint8(image: Float32[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w c"]:
    """Round (half to even) and clamp a float32 image (H, W, C) in 0..255 to uint8; the shape stays."""
    # One saturating pass of OpenCV does what NumPy needs three for, and drops a single channel's axis.
    return cv2.add(image, np.zeros(4), dtype=cv2.CV_8U).reshape(image.shape)


def _in_all_channels(noise: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(noise, cv2.COLOR_GRAY2RGB) if noise.shape[2] == 1 else noise


def _distinct_levels(levels: np.ndarray) -> int:
    """Count the levels that occur in a uint8 (H, W, C) image, in whichever channel."""
    histogram = sum(cv2.calcHist([levels], [channel], None, [256], [0, 256]) for channel in range(levels.shape[2]))
    return int(np.count_nonzero(histogram))


@lru_cache(maxsize=1)
def _normal_quantiles() -> np.ndarray:
    """Tabulate the standard normal distribution: the middles of 65,536 equally likely steps, float32."""
    quantiles: np.ndarray = ndtri((np.arange(_NORMAL_STEPS) + 0.5) / _NORMAL_STEPS)
    return quantiles.astype(np.float32)


def _poisson_counts(levels: np.ndarray, values: int, rng: np.random.Generator) -> np.ndarray:
    """Draw Poisson(level / 255 * values) for each uint8 level: int16 of the same shape.

    Inverts the distribution function at a 32-bit uniform number: the count is the number of thresholds at or below it.
    The number's leading bits, its cell, settle that for nearly all pixels; the others are drawn where they matter.
    """
    thresholds, guide = _poisson_tables(values)
    flat = levels.reshape(-1)
    cells = rng.integers(0, _CELLS, size=flat.size, dtype=np.uint16)
    places = flat.astype(np.intp)
    places <<= _CELL_BITS
    places |= cells
    counts = guide.take(places)
    unsure = np.flatnonzero(counts < 0)
    found = ~counts[unsure]
    level = flat[unsure]
    number = cells[unsure].astype(np.uint64) << np.uint64(_REST_BITS)
    number |= rng.integers(0, 1 << _REST_BITS, size=unsure.size, dtype=np.uint32)
    rising = np.arange(unsure.size)
    while rising.size:
        rising = rising[thresholds[level[rising], found[rising]] <= number[rising]]
        found[rising] += 1
    counts[unsure] = found
    return counts.reshape(levels.shape)


@lru_cache(maxsize=9)
def _poisson_tables(values: int) -> tuple[np.ndarray, np.ndarray]:
    """Tabulate Poisson(level / 255 * values) for the 256 levels.

    Returns thresholds (256, K) uint64, `2^32 P(count <= k)` at [level, k], and guide (256 * 2048,) int16: for each
    2048th of a level's 2^32 the number of thresholds below it, as `~number` where a threshold lies within.
    """
    means = np.arange(256)[:, None] / 255 * values
    # Nine standard deviations above the largest mean: beyond what 32 bits can resolve.
    counts = np.arange(int(values + 9 * np.sqrt(values)) + 12)
    thresholds = np.rint(pdtr(counts, means) * 2.0**32).astype(np.uint64)
    thresholds[:, -1] = 1 << 32
    edges = np.arange(_CELLS + 1, dtype=np.uint64) << np.uint64(_REST_BITS)
    guide = np.empty((256, _CELLS), np.int16)
    for row, marks in zip(guide, thresholds, strict=True):
        first = np.searchsorted(marks, edges[:-1], side="right")
        last = np.searchsorted(marks, edges[1:], side="left")
        row[:] = np.where(first == last, first, ~first)
    return thresholds, guide.reshape(-1)
