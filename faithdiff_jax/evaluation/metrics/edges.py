"""Edges of a restored picture against its reference's: are they where they were, and how much of them is there?

`gmsd` looks at edges only, whether they are where the reference has them, and `sharpness_ratio` at how much edge there
is at all. Smoothing lowers the second and spoils the first; noise raises the second, but spoils the first as well.
"""

import math

import cv2
import numpy as np
from jaxtyping import Float64

from faithdiff_jax.evaluation.metrics.fidelity import Reference, Restored
from faithdiff_jax.evaluation.metrics.names import SMALLEST_SIDE
from faithdiff_jax.evaluation.metrics.pictures import check_pair, check_side, luma

SIMILARITY_CONSTANT = 170.0
_NO_EDGE = 1e-9  # gray levels a pixel: what rounding leaves of the gradient of a flat picture


def gmsd(restored: Restored, reference: Reference) -> float:
    """Gradient magnitude similarity deviation: 0 for equal pictures, larger for worse ones (0.35 is very bad).

    The spread, over the picture, of how alike the edge strengths are: edges that are lost, moved or made up where the
    reference is smooth all raise it. Of the luma (ITU-R 601), averaged over 2x2 pixels first.

    Raises:
        InputError: pictures of two sizes, or a side under 11 pixels.

    Source: Xue et al. 2014, "Gradient magnitude similarity deviation", equations 1 to 6 and the authors' GMSD.m, whose
    zeros beyond the border are kept.
    """
    _check(restored, reference)
    x, y = (_gradient_magnitude(_halved(luma(picture))) for picture in (restored, reference))
    similarity = (2 * x * y + SIMILARITY_CONSTANT) / (x**2 + y**2 + SIMILARITY_CONSTANT)
    return float(np.std(similarity, ddof=1))


def sharpness_ratio(restored: Restored, reference: Reference) -> float:
    """Mean gradient magnitude over the reference's: below 1 is smoother than the reference, above 1 rougher.

    Of the luma at full size, by Prewitt's operator, without the outermost pixels. This says how much edge there is, not
    whether it is right: read it beside `gmsd`. Infinite, or 1 if both are, for a reference without any edge.

    Raises:
        InputError: pictures of two sizes, or a side under 11 pixels.

    Source: gradient-based focus measures (Pertuz et al. 2013, "Analysis of focus measure operators for
    shape-from-focus", section 2.1), as a ratio so that it does not depend on what the photograph shows.
    """
    _check(restored, reference)
    ours, theirs = (_gradient_magnitude(luma(picture))[1:-1, 1:-1].mean() for picture in (restored, reference))
    if theirs < _NO_EDGE:
        return 1.0 if ours < _NO_EDGE else math.inf
    return float(ours / theirs)


def _check(restored: Restored, reference: Reference) -> None:
    check_pair(restored, reference)
    check_side(restored, SMALLEST_SIDE)


def _halved(x: Float64[np.ndarray, "H W"]) -> Float64[np.ndarray, "h w"]:
    """Means of 2x2 pixels; an odd last row or column is averaged with zeros, as published."""
    x = np.pad(x, ((0, x.shape[0] % 2), (0, x.shape[1] % 2)))
    means: Float64[np.ndarray, "h w"] = (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4
    return means


def _gradient_magnitude(x: Float64[np.ndarray, "h w"]) -> Float64[np.ndarray, "h w"]:
    """Prewitt gradients of (H, W), a third of the 3x3 sums each, with zeros beyond the border."""
    difference, total = np.array([-1.0, 0.0, 1.0]) / 3, np.ones(3)
    across = cv2.sepFilter2D(x, cv2.CV_64F, difference, total, borderType=cv2.BORDER_CONSTANT)
    down = cv2.sepFilter2D(x, cv2.CV_64F, total, difference, borderType=cv2.BORDER_CONSTANT)
    magnitude: Float64[np.ndarray, "h w"] = np.hypot(across, down)
    return magnitude
