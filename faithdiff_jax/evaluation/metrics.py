"""Measures of a restored picture against its reference; none needs weights. Pictures are (H, W, 3) uint8 RGB.

`psnr` and `ssim` reward being close and thereby forgive smoothness; `gmsd` looks at edges only, whether they are where
the reference has them, and `sharpness_ratio` at how much edge there is at all. Smoothing lowers the last and spoils
the third; noise raises the last, but spoils the third as well.
"""

import math

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from faithdiff_jax.errors import InputError

Restored = UInt8[np.ndarray, "h w 3"]
Reference = UInt8[np.ndarray, "H W 3"]
"""Of the restored picture's size, or InputError says so."""

WINDOW, SIGMA = 11, 1.5
SMALLEST_SIDE = WINDOW
SIMILARITY_CONSTANT = 170.0
_NO_EDGE = 1e-9  # gray levels a pixel: what rounding leaves of the gradient of a flat picture
_LUMA = np.array([0.299, 0.587, 0.114])


def psnr(restored: Restored, reference: Reference) -> float:
    """Peak signal-to-noise ratio in dB over all pixels and channels; infinite for equal pictures.

    Raises:
        InputError: pictures of two sizes.
    """
    _check(restored, reference)
    error = float(np.mean(np.square(restored.astype(np.float64) - reference.astype(np.float64))))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(restored: Restored, reference: Reference) -> float:
    """Structural similarity, up to 1, the mean over the channels.

    The window is an 11x11 Gaussian with sigma 1.5, K1 = 0.01, K2 = 0.03; the mean is over the places where the window
    lies wholly inside the picture, so nothing is assumed beyond its border.

    Raises:
        InputError: pictures of two sizes, or a side under 11 pixels.

    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", equation 13
    with section III-C. scikit-image computes the same with `gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False`.
    """
    _check(restored, reference)
    x, y = restored.astype(np.float64), reference.astype(np.float64)
    mean_x, mean_y = _window(x), _window(y)
    variance_x, variance_y = _window(x * x) - mean_x**2, _window(y * y) - mean_y**2
    covariance = _window(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float(np.mean(luminance * structure))


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
    x, y = (_gradient_magnitude(_halved(_luma(picture))) for picture in (restored, reference))
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
    ours, theirs = (_gradient_magnitude(_luma(picture))[1:-1, 1:-1].mean() for picture in (restored, reference))
    if theirs < _NO_EDGE:
        return 1.0 if ours < _NO_EDGE else math.inf
    return float(ours / theirs)


def _check(restored: Restored, reference: Reference) -> None:
    for name, picture in (("restored", restored), ("reference", reference)):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"{name} is {picture.dtype} {picture.shape}: must be uint8 (height, width, 3)")
    if restored.shape != reference.shape:
        sizes = f"{restored.shape[1]}x{restored.shape[0]} and {reference.shape[1]}x{reference.shape[0]}"
        raise InputError(f"pictures of {sizes} pixels cannot be compared: must have one size")
    if min(restored.shape[:2]) < SMALLEST_SIDE:
        size = f"{restored.shape[1]}x{restored.shape[0]}"
        raise InputError(f"pictures of {size} pixels cannot be compared: each side must have at least {SMALLEST_SIDE}")


def _window(x: Float64[np.ndarray, "H W c"]) -> Float64[np.ndarray, "h w c"]:
    """Gaussian means of (H, W, C) float64 where the window lies inside: (H - 10, W - 10, C)."""
    inside = WINDOW // 2
    return cv2.GaussianBlur(x, (WINDOW, WINDOW), SIGMA)[inside:-inside, inside:-inside]


def _luma(picture: UInt8[np.ndarray, "h w 3"]) -> Float64[np.ndarray, "h w"]:
    luma: Float64[np.ndarray, "h w"] = picture.astype(np.float64) @ _LUMA
    return luma


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
