"""What every metric does with pictures first: check that they can be compared, cut off a border, take their luma."""

import functools
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Float32, Float64, UInt8

from faithdiff_jax.errors import InputError

Picture = UInt8[np.ndarray, "_ _ 3"]
"""(height, width, 3) RGB."""

Color = Literal["rgb", "yiq", "ycbcr"]

# Weights of R, G and B in [0, 1], and what is added: the first of full range, the second of BT.601's 16 to 235.
LUMA = {"yiq": ((0.299, 0.587, 0.114), 0.0), "ycbcr": ((65.481 / 255, 128.553 / 255, 24.966 / 255), 16 / 255)}


def luma(picture: Picture, color: Color = "yiq") -> Float64[np.ndarray, "h w"]:
    """Y of a picture, in gray levels: of YIQ from 0 to 255, of YCbCr (BT.601) from 16 to 235."""
    weights, offset = LUMA[color]
    y: Float64[np.ndarray, "h w"] = picture.astype(np.float64) @ np.array(weights) + 255 * offset
    return y


def rounded_luma(picture: Picture, color: Color) -> Float64[np.ndarray, "h w"]:
    """Y of a picture in whole gray levels, of values in float32.

    One pixel in a thousand lies halfway between two levels. Which one it gets is seen in NIQE's second digit: we add in
    the order that gives the same as pyiqa.
    """
    products = cv2.LUT(np.ascontiguousarray(picture), _products(color))
    y = (products[..., 0] + products[..., 1]) + products[..., 2]
    if color == "ycbcr":
        y = (y + np.float32(16)) / np.float32(255)
    whole: Float64[np.ndarray, "h w"] = np.rint(y * np.float32(255)).astype(np.float64)
    return whole


@functools.cache
def _products(color: Color) -> Float32[np.ndarray, "1 256 3"]:
    """Each channel's share of Y by its level; for YCbCr it is in gray levels."""
    weights = LUMA[color][0] if color == "yiq" else (65.481, 128.553, 24.966)
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    return levels[None, :, None] * np.array(weights, np.float32)[None, None]


def check_picture(name: str, picture: Picture) -> None:
    """See that a picture is (height, width, 3) uint8; anything else is a mistake of the program (ValueError)."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"{name} is {picture.dtype} {picture.shape}: must be uint8 (height, width, 3)")


def check_pair(restored: Picture, reference: Picture) -> None:
    """See that two pictures have one size.

    Raises:
        InputError: they have not.
    """
    check_picture("restored", restored)
    check_picture("reference", reference)
    if restored.shape != reference.shape:
        sizes = f"{_size(restored)} and {_size(reference)}"
        raise InputError(f"pictures of {sizes} pixels cannot be compared: must have one size")


def check_side(picture: Picture, smallest: int) -> None:
    """See that a picture is large enough to be measured.

    Raises:
        InputError: a side is under `smallest` pixels.
    """
    if min(picture.shape[:2]) < smallest:
        raise InputError(f"pictures of {_size(picture)} pixels are too small: each side must have at least {smallest}")


def without_border(picture: Picture, border: int) -> Picture:
    """The picture without its outermost `border` pixels on each side."""
    return picture[border:-border, border:-border] if border else picture


def _size(picture: Picture) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"
