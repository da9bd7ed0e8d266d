"""What every metric does with pictures first: check that they can be compared, cut off a border, take their luma."""

from typing import Literal

import numpy as np
from jaxtyping import Float64, UInt8

from faithdiff_jax.errors import InputError

Picture = UInt8[np.ndarray, "_ _ 3"]
"""(height, width, 3) RGB."""

Color = Literal["rgb", "yiq", "ycbcr"]

# Weights of R, G and B, and what is added: the first of full range, the second of BT.601's 16 to 235.
LUMA = {
    "yiq": (np.array([0.299, 0.587, 0.114]), 0.0),
    "ycbcr": (np.array([65.481, 128.553, 24.966]) / 255, 16.0),
}


def luma(picture: Picture, color: Color = "yiq") -> Float64[np.ndarray, "h w"]:
    """Y of a picture, in gray levels, not rounded: of YIQ from 0 to 255, of YCbCr (BT.601) from 16 to 235."""
    weights, offset = LUMA[color]
    y: Float64[np.ndarray, "h w"] = picture.astype(np.float64) @ weights + offset
    return y


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
