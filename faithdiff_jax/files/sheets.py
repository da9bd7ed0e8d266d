"""Pictures and lines of text put together on white paper, to look at: rows, columns, contact sheets.

Everything is an (H, W, 3) uint8 picture, and so is what is put together of it.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

Picture = UInt8[np.ndarray, "_h _w 3"]

LINE = 18  # pixels from one line of text to the next
GAP = 4
PAPER = 255
INK = (34, 34, 34)
_INDENT = 3
_FONT = ImageFont.load_default(12)


def side_by_side(pictures: Sequence[Picture], gap: int = GAP) -> Picture:
    """Pictures of any sizes in a row, aligned at the top with gaps of that many pixels."""
    return _joined(pictures, 1, gap)


def stacked(pictures: Sequence[Picture], gap: int = GAP) -> Picture:
    """Pictures of any sizes above one another, aligned at the left with gaps of that many pixels."""
    return _joined(pictures, 0, gap)


def titled(title: str, picture: Picture) -> Picture:
    """A picture under its title, a line that is cut where the picture ends."""
    return stacked([written([title], picture.shape[1]), picture], 0)


def written(lines: Sequence[str], width: int, colour: tuple[int, int, int] = INK) -> Picture:
    """Lines of text on paper of that width in pixels; what does not fit is cut."""
    sheet = Image.new("RGB", (width, LINE * len(lines)), (PAPER,) * 3)
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        pen.text((_INDENT, 1 + number * LINE), _cut(line, width), colour, _FONT)
    return np.array(sheet)


def wrapped(pieces: Sequence[str], joint: str, width: int, indent: str = "") -> list[str]:
    """Join pieces of text into lines for `written`, all but the first with the indent; none is broken."""
    lines: list[str] = []
    for piece in pieces:
        longer = f"{lines[-1]}{joint}{piece}" if lines else piece
        if lines and not _fits(_plain(longer), width):
            lines.append(f"{indent}{piece}")
        else:
            lines[-1:] = [longer]
    return lines


def at_most(picture: Picture, largest_side: int) -> Picture:
    """The picture scaled down (Lanczos), if need be, until no side has more pixels than that."""
    height, width, _ = picture.shape
    if max(height, width) <= largest_side:
        return picture
    scale = largest_side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.array(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def _joined(pictures: Sequence[Picture], axis: int, gap: int) -> Picture:
    shape = [max(picture.shape[side] for picture in pictures) for side in (0, 1)]
    shape[axis] = sum(picture.shape[axis] for picture in pictures) + gap * (len(pictures) - 1)
    sheet = np.full((*shape, 3), PAPER, np.uint8)
    start = [0, 0]
    for picture in pictures:
        sheet[start[0] : start[0] + picture.shape[0], start[1] : start[1] + picture.shape[1]] = picture
        start[axis] += picture.shape[axis] + gap
    return sheet


def _fits(text: str, width: int) -> bool:
    return _FONT.getlength(text) <= width - 2 * _INDENT


def _cut(text: str, width: int) -> str:
    text = _plain(text)
    if _fits(text, width):
        return text
    while text and not _fits(f"{text}...", width):
        text = text[:-1]
    return f"{text}..." if text else ""


def _plain(text: str) -> str:
    """Only what the built-in font has: accents are dropped, other letters beyond ASCII become question marks."""
    letters = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return "".join(letter if letter.isprintable() and letter.isascii() else "?" for letter in letters)
