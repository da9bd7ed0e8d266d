"""Pictures beside and above one another, to look at."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from faithdiff_jax.evaluation.metrics import psnr

STRIP = 18  # pixels above each picture for its title
TEXT_SIZE = 12
GAP = 4
MARGIN = 3
PAPER, INK = (255, 255, 255), (34, 34, 34)


def side_by_side(pictures: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Pictures of one height in a row, each under its title.

    Args:
        pictures: (title, (H, W, 3) uint8); a title that is wider than its picture is cut.

    Returns:
        (H + 18, sum of the widths and of gaps of 4 pixels, 3) uint8, white where there is no picture.
    """
    heights = {picture.shape[0] for _, picture in pictures}
    if len(heights) != 1:
        raise ValueError(f"pictures have heights {sorted(heights)}: must be one height, of at least one picture")
    widths = [picture.shape[1] for _, picture in pictures]
    font = ImageFont.load_default(TEXT_SIZE)
    sheet = Image.new("RGB", (sum(widths) + GAP * (len(widths) - 1), STRIP + heights.pop()), PAPER)
    pen = ImageDraw.Draw(sheet)
    left = 0
    for (title, picture), width in zip(pictures, widths, strict=True):
        sheet.paste(Image.fromarray(np.ascontiguousarray(picture)), (left, STRIP))
        pen.text((left + MARGIN, 1), _fitting(title, font, width - 2 * MARGIN), INK, font)
        left += width + GAP
    return np.array(sheet)


def comparison(low: np.ndarray, restored: np.ndarray, reference: np.ndarray | None = None) -> np.ndarray:
    """What a restoration is to be judged by, in a row: input, bicubic, restored and, where there is one, the original.

    Args:
        low: the low-quality input, (h, w, 3) uint8; shown with its pixels as squares.
        restored: (H, W, 3) uint8.
        reference: (H, W, 3) uint8, the true picture; titles then give each one's PSNR against it.

    Returns:
        The row of `side_by_side`.
    """
    size = restored.shape[1], restored.shape[0]
    squares, bicubic = (
        np.array(Image.fromarray(low).resize(size, method))
        for method in (Image.Resampling.NEAREST, Image.Resampling.BICUBIC)
    )
    row = [("input", squares), ("bicubic", bicubic), ("restored", restored)]
    if reference is not None:
        row[1:] = [(f"{title}, {psnr(picture, reference):.2f} dB", picture) for title, picture in row[1:]]
        row.append(("original", reference))
    return side_by_side(row)


def stacked(pictures: Sequence[np.ndarray], largest_side: int | None = None) -> np.ndarray:
    """Pictures above one another, aligned at the left with gaps of 4 pixels.

    Args:
        pictures: (H, W, 3) uint8 of any sizes.
        largest_side: a higher or wider result is scaled down to this many pixels; None for any size.

    Returns:
        (H', W', 3) uint8.
    """
    width = max(picture.shape[1] for picture in pictures)
    height = sum(picture.shape[0] for picture in pictures) + GAP * (len(pictures) - 1)
    sheet = np.full((height, width, 3), PAPER, np.uint8)
    top = 0
    for picture in pictures:
        sheet[top : top + picture.shape[0], : picture.shape[1]] = picture
        top += picture.shape[0] + GAP
    if largest_side is None or max(height, width) <= largest_side:
        return sheet
    scale = largest_side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.array(Image.fromarray(sheet).resize(size, Image.Resampling.LANCZOS))


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The title as far as it fits, in letters that the built-in font has: others become question marks."""
    text = text.encode("ascii", "replace").decode()
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..." if text else ""
