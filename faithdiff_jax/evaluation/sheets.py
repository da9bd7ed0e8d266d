"""Sheets as papers print them: a picture with a marked place, and that place enlarged from every method.

Comparison, Measured, places --draw_sheet--> one picture: a row for each name, the marked picture at the left
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.comparison import BICUBIC, INPUT, REFERENCE, Comparison, Group
from faithdiff_jax.evaluation.measured import Measured
from faithdiff_jax.evaluation.metrics.pictures import luma
from faithdiff_jax.files.images import MAX_TARGET_PIXELS
from faithdiff_jax.files.sheets import GAP, PAPER, side_by_side, stacked, wrapped, written
from faithdiff_jax.files.sheets import LINE as TEXT_LINE

CELL = 220
"""Height of an enlarged crop, in pixels."""
MARK = (230, 30, 40)
BLANK = 235
LINE = 3  # pixels, of the marks
MARGIN = 16
FEWEST_IN_TWO_LINES = 4  # crops
WIDEST = 4.0  # of a crop, width to height or height to width
SMALLEST_CROP = 8

Enlarge = Literal["lanczos", "nearest"]
Picture = UInt8[np.ndarray, "_ _ 3"]


class Crop(NamedTuple):
    """A rectangle of a picture, in pixels of the size that all are shown at."""

    x: int
    y: int
    width: int
    height: int


def choose_crop(group: Group, side: int) -> Crop:
    """The square in which the methods differ most: where the variance of their luma is largest on average.

    The variance is taken over the methods, bicubic among them, at each pixel; of equal squares the topmost counts, then
    the leftmost. A single method is compared with the reference. A side larger than the picture's is cut down.
    """
    height, width = group.size
    side = min(side, height, width)
    ours = [column for column in group.pictures if column not in (INPUT, REFERENCE)]
    columns = ours if len(ours) > 1 else list(group.pictures)
    planes = np.stack([luma(_resized(group.pictures[column], group.size)) for column in columns])
    sums = cv2.integral(planes.var(axis=0))
    means = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    # Rounded, so that sums of equal squares are equal however they came about.
    y, x = np.unravel_index(np.argmax(np.round(means, 3)), means.shape)
    return Crop(int(x), int(y), side, side)


def check_crop(crop: Crop, group: Group) -> None:
    """See that a crop lies in the picture.

    Raises:
        InputError: it does not, is smaller than 8 pixels, or more than four times as long as it is wide.
    """
    height, width = group.size
    inside = crop.x >= 0 and crop.y >= 0 and crop.x + crop.width <= width and crop.y + crop.height <= height
    if not inside or min(crop.width, crop.height) < SMALLEST_CROP:
        raise InputError(
            f"crop {','.join(map(str, crop))} of {group.name}: must lie in its {width}x{height} pixels and have "
            f"{SMALLEST_CROP} or more on each side"
        )
    if max(crop.width / crop.height, crop.height / crop.width) > WIDEST:
        raise InputError(f"crop {','.join(map(str, crop))}: one side is more than {WIDEST:g} times the other")


def draw_sheet(
    comparison: Comparison,
    measured: Measured,
    names: Sequence[str],
    crops: Sequence[Crop] | int,
    enlarge: Enlarge = "lanczos",
) -> tuple[Picture, list[str]]:
    """Draw the sheet.

    Args:
        comparison: methods, inputs and references.
        measured: figures, below the crops.
        names: of the pictures, a row each.
        crops: one for all rows, or one for each; or the side of squares that `choose_crop` chooses.
        enlarge: how crops are enlarged. Those of the input are always shown with their pixels as squares.

    Returns:
        The sheet (H, W, 3) uint8, and a line for each picture that cannot be read.

    Raises:
        InputError: a crop outside its picture, crops that are not as many as rows, or a sheet that is too large.
    """
    if not isinstance(crops, int) and len(crops) not in (1, len(names)):
        raise InputError(f"{len(crops)} crops for {len(names)} pictures: give one for all, or one for each")
    rows, faults = [], []
    pixels = 0
    for number, group in enumerate(comparison.groups(names)):
        faults += group.faults
        if not group.pictures:
            continue
        if isinstance(crops, int):
            crop = choose_crop(group, crops)
        else:
            crop = crops[number % len(crops)]
            check_crop(crop, group)
        rows.append(_row(group, comparison.columns, measured, crop, enlarge))
        pixels += rows[-1].shape[0] * rows[-1].shape[1]
        if pixels > MAX_TARGET_PIXELS:
            raise InputError(f"the sheet would have more than {MAX_TARGET_PIXELS:,} pixels: name fewer pictures")
    if not rows:
        raise InputError(f"no picture can be shown; the first: {faults[0]}")
    note = (
        f"Crops enlarged by {enlarge.capitalize()}" + ", of the input by Nearest" * (INPUT in comparison.columns) + "."
    )
    if isinstance(crops, int):
        note += " They are where the methods differ most (variance of luma)."
    width = max(row.shape[1] for row in rows)
    sheet = stacked([*rows, written(wrapped(note.split(), " ", width), width)], MARGIN)
    return np.pad(sheet, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=PAPER), faults


def _row(group: Group, columns: Sequence[str], measured: Measured, crop: Crop, enlarge: Enlarge) -> Picture:
    cells = [_cell(group, column, measured, crop, enlarge) for column in columns]
    tallest = max(cell.shape[0] for cell in cells)
    cells = [_taller(cell, tallest) for cell in cells]
    in_line = len(cells) if len(cells) < FEWEST_IN_TWO_LINES else -(-len(cells) // 2)
    lines = [side_by_side(cells[start : start + in_line]) for start in range(0, len(cells), in_line)]
    block = stacked(lines)
    return side_by_side([_marked(group, crop, block.shape[0]), block], 2 * GAP)


def _cell(group: Group, column: str, measured: Measured, crop: Crop, enlarge: Enlarge) -> Picture:
    """A crop in its frame, over the name of its column and its figures."""
    size = max(1, round(CELL * crop.width / crop.height)), CELL
    if column not in group.pictures:
        return stacked([np.full((*size[::-1], 3), BLANK, np.uint8), written([f"{column}: none"], size[0])], 0)
    picture = group.pictures[column]
    across, down = picture.shape[1] / group.size[1], picture.shape[0] / group.size[0]
    box = crop.x * across, crop.y * down, (crop.x + crop.width) * across, (crop.y + crop.height) * down
    method = Image.Resampling.NEAREST if column == INPUT or enlarge == "nearest" else Image.Resampling.LANCZOS
    large = Image.fromarray(picture).resize(size, method, box=box)
    ImageDraw.Draw(large).rectangle((0, 0, size[0] - 1, size[1] - 1), outline=MARK, width=LINE)
    figures = [
        f"{info.title} {value:.{info.digits}f}"
        for info, value in zip(measured.infos, measured.of(column, group.name), strict=True)
        if value is not None
    ]
    return stacked([np.array(large), written([column, *wrapped(figures, "  ", size[0])], size[0])], 0)


def _marked(group: Group, crop: Crop, height: int) -> Picture:
    """The reference, or the last method's picture, with the place of the crop, over its name."""
    best = [column for column in group.pictures if column not in (INPUT, BICUBIC)] or list(group.pictures)
    picture = _resized(group.pictures[best[-1]], group.size)
    room = height - TEXT_LINE
    scale = room / group.size[0]
    size = max(1, round(group.size[1] * scale)), room
    small = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)
    # Around the place; at the border of the picture, inside it.
    left, top = (max(0, round(start * scale) - LINE) for start in crop[:2])
    right = min(size[0], round((crop.x + crop.width) * scale) + LINE) - 1
    bottom = min(size[1], round((crop.y + crop.height) * scale) + LINE) - 1
    ImageDraw.Draw(small).rectangle((left, top, right, bottom), outline=MARK, width=LINE)
    return stacked([np.array(small), written([f"{group.name} ({best[-1]})"], size[0])], 0)


def _taller(picture: Picture, height: int) -> Picture:
    return np.pad(picture, ((0, height - picture.shape[0]), (0, 0), (0, 0)), constant_values=PAPER)


def _resized(picture: Picture, size: tuple[int, int]) -> Picture:
    if picture.shape[:2] == size:
        return picture
    return np.array(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC))
