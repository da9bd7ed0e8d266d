"""PSNR and SSIM: how close a restored picture is to its reference; both forgive smoothness."""

import math

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from faithdiff_jax.evaluation.metrics.names import SMALLEST_SIDE
from faithdiff_jax.evaluation.metrics.pictures import (
    Color,
    Picture,
    check_pair,
    check_side,
    luma,
    rounded_luma,
    without_border,
)

Restored = UInt8[np.ndarray, "h w 3"]
Reference = UInt8[np.ndarray, "H W 3"]
"""Of the restored picture's size, or InputError says so."""

WINDOW, SIGMA = SMALLEST_SIDE, 1.5
PYIQA_EPSILON = 1e-8
"""What pyiqa adds to the mean squared error of pictures in [0, 1]: equal pictures have 80 dB."""


def psnr(
    restored: Restored, reference: Reference, *, color: Color = "rgb", border: int = 0, epsilon: float = 0.0
) -> float:
    """Peak signal-to-noise ratio in dB over all pixels and channels, or of Y; infinite for equal pictures.

    Args:
        restored: the picture.
        reference: what it is compared with.
        color: "rgb"; "yiq" for Y of full range, or "ycbcr" for Y of BT.601, whose 219 levels give 20 log10(255/219) =
            1.32 dB more. Y is not rounded, and the peak is 255 for both, as in pyiqa.
        border: pixels cut off on each side first.
        epsilon: added to the mean squared error of pictures in [0, 1] (`PYIQA_EPSILON`, if results are to be pyiqa's).

    Raises:
        InputError: pictures of two sizes, or nothing left within the border.
    """
    x, y = _pair(restored, reference, border, 1)
    if color == "rgb":
        error = cv2.norm(x, y, cv2.NORM_L2SQR) / x.size
    else:
        error = float(np.mean(np.square(luma(x, color) - luma(y, color))))
    error = error / 255**2 + epsilon
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(
    restored: Restored, reference: Reference, *, color: Color = "rgb", border: int = 0, nonnegative: bool = False
) -> float:
    """Structural similarity, up to 1: the mean over the channels, or of Y.

    The window is an 11x11 Gaussian with sigma 1.5, K1 = 0.01, K2 = 0.03; the mean is over the places where the window
    lies wholly inside the picture, so nothing is assumed beyond its border.

    Args:
        restored: the picture.
        reference: what it is compared with.
        color: "rgb"; "yiq" for Y of full range or "ycbcr" for Y of BT.601, either rounded to whole levels, as in pyiqa.
        border: pixels cut off on each side first.
        nonnegative: places whose contrast and structure are negatively related count as 0, as in pyiqa.

    Raises:
        InputError: pictures of two sizes, or a side under 11 pixels within the border.

    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", equation 13
    with section III-C. scikit-image computes the same with `gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False`.
    """
    pair = _pair(restored, reference, border, SMALLEST_SIDE)
    x, y = (picture.astype(np.float64) if color == "rgb" else rounded_luma(picture, color) for picture in pair)
    mean_x, mean_y = _window(x), _window(y)
    variance_x, variance_y = _window(x * x) - mean_x**2, _window(y * y) - mean_y**2
    covariance = _window(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float(np.mean(luminance * (np.maximum(structure, 0) if nonnegative else structure)))


def _pair(restored: Picture, reference: Picture, border: int, smallest: int) -> tuple[Picture, Picture]:
    """Both pictures without their border, once they are known to be comparable."""
    check_pair(restored, reference)
    check_side(restored, smallest + 2 * border)
    return without_border(restored, border), without_border(reference, border)


def _window(x: Float64[np.ndarray, "H W *c"]) -> Float64[np.ndarray, "h w *c"]:
    """Gaussian means of each channel where the window lies inside: (H - 10, W - 10)."""
    inside = WINDOW // 2
    return cv2.GaussianBlur(x, (WINDOW, WINDOW), SIGMA)[inside:-inside, inside:-inside]
