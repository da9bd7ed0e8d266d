"""Encoded pictures to pixels, for training: one decoder, measured faster than the other one and as strict."""

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.images import MAX_PIXELS

_ORIENTATION_TAG = 0x0112


def decode(data: bytes, name: str) -> UInt8[np.ndarray, "h w 3"]:
    """Decode a whole picture: (H, W, 3) uint8 RGB, upright by its EXIF orientation.

    Deep channels come to 8 bits, gray and palettes to RGB; colours under transparent pixels are kept. Raises
    InputError naming `name` for anything that is not a complete picture: a truncated file is not filled up.
    """
    height, width = header_size(io.BytesIO(data), name)
    if height * width > MAX_PIXELS:
        raise InputError(f"{name}: {width}x{height} pixels, at most {MAX_PIXELS:,} are read")
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise InputError(f"{name}: damaged, empty or too large a picture") from error
    if pixels is None:
        raise InputError(f"{name}: not a picture, or a damaged one; give a complete JPEG, PNG, WebP or TIFF file")
    return pixels


def header_size(file: Path | BinaryIO, name: str) -> tuple[int, int]:
    """Read height and width, upright, from a picture's header; the pixels are not touched.

    Raises InputError naming `name` if there is no picture's header.
    """
    try:
        # Odd EXIF data and large pictures are remarked upon as warnings; neither matters here.
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            width, height = image.size
            # The base class's method: PNG's own decodes all pixels first, to find EXIF data that may follow them.
            turned = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1) in (5, 6, 7, 8)
    except Exception as error:  # Pillow meets broken headers with errors of many kinds
        raise InputError(f"{name}: not a picture that can be read") from error
    return (width, height) if turned else (height, width)
