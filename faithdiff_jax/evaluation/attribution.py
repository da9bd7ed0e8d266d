"""Attribution maps to look at: the heat map of a word over the picture, with a legend."""

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from faithdiff_jax.files.sheets import LINE, Picture, stacked, written


def attribution_sheet(picture: UInt8[np.ndarray, "h w 3"], word: str, attribution: Float[np.ndarray, "h w"]) -> Picture:
    """The map of a word over a picture, as DAAM shows it, with the word above and the colours' meaning below.

    Args:
        picture: (h, w, 3).
        word: the title.
        attribution: (h, w), from `FaithDiff.attribute`; any range. Colours go from its least to its largest value, and
            the more of a pixel's colour shows, the larger its value.

    Returns:
        (h + 72, w, 3), in lines of 18 pixels.
    """
    low, high = float(attribution.min()), float(attribution.max())
    heat = (attribution - low) / max(high - low, 1e-8)
    shown = heat[..., None] * _colours(heat) + (1 - heat[..., None]) * picture
    width = picture.shape[1]
    scale = np.tile(np.linspace(0, 1, width, dtype=np.float32), (LINE, 1))
    legend = [f"{low:.3g} to {high:.3g}", "part of a pixel's attention to the word"]
    return stacked(
        [written([word], width), np.rint(shown).astype(np.uint8), _colours(scale), written(legend, width)], 0
    )


def _colours(heat: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Values 0 to 1 in the colours of Turbo, from blue over green to red."""
    levels = np.rint(heat * 255).astype(np.uint8)
    return np.ascontiguousarray(cv2.applyColorMap(levels, cv2.COLORMAP_TURBO)[..., ::-1])
