"""NIQE: how far a picture's local statistics are from those of pristine photographs; lower is better, no reference.

picture -> Y -> [full size, half size] -> locally normalised -> blocks -> 18 features of each -> Gaussian -> distance

The definition is Mittal et al. 2013, "Making a completely blind image quality analyzer", as pyiqa computes it: Y of
YIQ, rounded; a window whose weights are rounded to float32, so that blocks without any texture are left out; blocks of
96x96 that lie wholly inside the picture. With Y of YCbCr, pictures with texture everywhere get what BasicSR computes.
"""

import functools
import math
from typing import Literal, NamedTuple

import cv2
import numpy as np
import scipy.special
from jaxtyping import Float64

from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.metrics.pictures import Picture, check_picture, rounded_luma
from faithdiff_jax.evaluation.metrics.weights import shipped

BLOCK = 96
LEAST_BLOCKS = 2
WINDOW, SIGMA = 7, 7 / 6
SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Down and right: the neighbours that a pixel is multiplied with."""
SHAPES = (np.arange(200, 10_001) / 1000).astype(np.float32).astype(np.float64)
"""The shape parameters of the generalised Gaussian that are tried, rounded as pyiqa's are."""


def niqe(picture: Picture, *, color: Literal["yiq", "ycbcr"] = "yiq") -> float:
    """NIQE of a picture; NaN if fewer than two of its blocks have any texture.

    Args:
        picture: (H, W, 3), with at least two blocks of 96x96.
        color: Y of YIQ, full range, as pyiqa has it; "ycbcr", BT.601, as BasicSR has it.

    Raises:
        InputError: the picture is too small.
    """
    check_picture("restored", picture)
    rows, columns = (side // BLOCK for side in picture.shape[:2])
    if rows * columns < LEAST_BLOCKS:
        size = f"{picture.shape[1]}x{picture.shape[0]}"
        raise InputError(f"a picture of {size} pixels is too small: NIQE needs two blocks of {BLOCK}x{BLOCK} at least")
    y = rounded_luma(picture[: rows * BLOCK, : columns * BLOCK], color)
    features = np.concatenate([_features(y, BLOCK), _features(_halved(y), BLOCK // 2)], axis=1)
    whole = features[~np.isnan(features).any(axis=1)]
    if len(whole) < LEAST_BLOCKS:
        return math.nan
    pristine = _pristine()
    covariance = (pristine.covariance + np.cov(whole, rowvar=False)) / 2
    difference = pristine.mean - np.nanmean(features, axis=0)
    return float(np.sqrt(difference @ np.linalg.pinv(covariance) @ difference))


class _Pristine(NamedTuple):
    """Mean (36,) and covariance (36, 36) of the features of pristine photographs."""

    mean: Float64[np.ndarray, "36"]
    covariance: Float64[np.ndarray, "36 36"]


@functools.cache
def _pristine() -> _Pristine:
    return _Pristine(**shipped("niqe"))


def _features(y: Float64[np.ndarray, "h w"], side: int) -> Float64[np.ndarray, "blocks 18"]:
    """Of each block of side x side: the shape and spread of its pixels, and of their products with four neighbours."""
    rows, columns = y.shape[0] // side, y.shape[1] // side
    blocks = _normalised(y).reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side, side)
    shape, left, right = _asymmetric_gaussian(blocks)
    features = [shape, (left + right) / 2]
    for shift in SHIFTS:
        shape, left, right = _asymmetric_gaussian(blocks * np.roll(blocks, shift, axis=(1, 2)))
        mean = (right - left) * np.exp(scipy.special.gammaln(2 / shape) - scipy.special.gammaln(1 / shape))
        features += [shape, mean, left, right]
    return np.stack(features, axis=1)


def _normalised(y: Float64[np.ndarray, "h w"]) -> Float64[np.ndarray, "h w"]:
    """Each pixel less the mean around it, divided by the deviation around it and 1."""
    mean, square = _blurred(y), _blurred(y * y)
    normalised: Float64[np.ndarray, "h w"] = (y - mean) / (np.sqrt(np.abs(square - mean * mean)) + 1)
    return normalised


def _asymmetric_gaussian(
    blocks: Float64[np.ndarray, "blocks h w"],
) -> tuple[Float64[np.ndarray, " blocks"], Float64[np.ndarray, " blocks"], Float64[np.ndarray, " blocks"]]:
    """Shape and scales to the left and right of 0 of the asymmetric generalised Gaussian that fits each block's values.

    Scales are NaN where nothing is left, or nothing right, of 0, and the shape is then the smallest that is tried.

    Source: Lasmar et al. 2009, "Multiscale skewed heavy tailed model for texture analysis", by moments.
    """
    x = blocks.reshape(len(blocks), -1)
    negative = np.minimum(x, 0)
    squares, squares_left = np.einsum("bp,bp->b", x, x), np.einsum("bp,bp->b", negative, negative)
    absolute = (x.sum(1) - 2 * negative.sum(1)) / x.shape[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        left = np.sqrt(squares_left / np.count_nonzero(x < 0, axis=1))
        right = np.sqrt((squares - squares_left) / np.count_nonzero(x > 0, axis=1))
        ratio = left / right
        moments = absolute**2 / (squares / x.shape[1])
        moments *= (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
    shape = SHAPES[_nearest(_moments(), moments)]
    scale = np.exp((scipy.special.gammaln(1 / shape) - scipy.special.gammaln(3 / shape)) / 2)
    return shape, left * scale, right * scale


@functools.cache
def _moments() -> Float64[np.ndarray, " shapes"]:
    """(E|x|)^2 / E[x^2] of the generalised Gaussian of each of SHAPES; it grows with them."""
    log_gamma = scipy.special.gammaln
    moments: Float64[np.ndarray, " shapes"] = np.exp(
        2 * log_gamma(2 / SHAPES) - log_gamma(1 / SHAPES) - log_gamma(3 / SHAPES)
    )
    return moments


def _nearest(ascending: Float64[np.ndarray, " n"], values: Float64[np.ndarray, " m"]) -> np.ndarray:
    """The index of the number that is nearest to each value; 0 for NaN."""
    after = np.clip(np.searchsorted(ascending, values), 1, len(ascending) - 1)
    nearest = np.where(values - ascending[after - 1] <= ascending[after] - values, after - 1, after)
    return np.where(np.isnan(values), 0, nearest)


@functools.cache
def _window() -> Float64[np.ndarray, "7"]:
    """The Gaussian along one side. Its square sums to what the 49 weights of the window do, each rounded to float32."""
    weights = cv2.getGaussianKernel(WINDOW, SIGMA, cv2.CV_64F).ravel()
    total = np.outer(weights, weights).astype(np.float32).sum(dtype=np.float64)
    rounded: Float64[np.ndarray, 7] = weights * np.sqrt(total)
    return rounded


def _blurred(y: Float64[np.ndarray, "h w"]) -> Float64[np.ndarray, "h w"]:
    """The window's mean around each pixel; the outermost pixels are repeated beyond the border."""
    return cv2.sepFilter2D(y, cv2.CV_64F, _window(), _window(), borderType=cv2.BORDER_REPLICATE)


def _halved(y: Float64[np.ndarray, "h w"]) -> Float64[np.ndarray, "h/2 w/2"]:
    """MATLAB's imresize by 0.5: the cubic kernel with a = -1/2, twice as wide; the picture mirrored at its border.

    In float32, as pyiqa has it: which shape is nearest to a block's moments would otherwise differ here and there.
    """
    distance = np.abs(np.arange(8) - 3.5) / 2
    near, far = 1.5 * distance**3 - 2.5 * distance**2 + 1, -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance <= 1, near, far)
    weights = (weights / weights.sum()).astype(np.float32)
    height, width = y.shape
    padded = np.pad((y / 255).astype(np.float32), ((3, 4), (3, 4)), mode="symmetric")
    rows = sum(weights[i] * padded[i : i + height : 2] for i in range(8))
    halved = sum(weights[i] * rows[:, i : i + width : 2] for i in range(8))
    result: Float64[np.ndarray, "h/2 w/2"] = np.multiply(halved, 255, dtype=np.float64)
    return result
