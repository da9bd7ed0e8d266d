"""Where the tiles of a latent lie. Arithmetic alone: options are checked with it before JAX is imported."""

import math

Corners = tuple[tuple[int, int], ...]


def latent_grid(height: int, width: int, tile: int, overlap: float) -> Corners:
    """(top, left) of each tile, row by row; tiles are min(tile, height) by min(tile, width).

    `overlap` is the published stride fraction in (0, 1]: a tile starts ceil(side of a tile * overlap) after the one
    before, and the last of a row or column is pushed back inside. So 0.5 overlaps by half, 1 not at all.
    Raises ValueError for sizes under 1 or an overlap outside its range.
    """
    if min(height, width, tile) < 1:
        raise ValueError(f"height {height}, width {width} and tile {tile} must be at least 1")
    if not 0 < overlap <= 1:
        raise ValueError(f"overlap {overlap} is a stride fraction, it must lie in (0, 1]")
    return tuple((top, left) for top in _starts(height, tile, overlap) for left in _starts(width, tile, overlap))


def count_tiles(height: int, width: int, tile: int, overlap: float) -> int:
    """How many tiles `latent_grid` gives, without laying them out."""
    return math.prod(len(_strides(side, tile, overlap)) + 1 for side in (height, width))


def spread(side: int, tile: int, reach: int) -> list[int]:
    """Where tiles along a side start that overlap by at least twice `reach` and a fade between, evenly spread.

    Raises:
        ValueError: a tile of which less than half would be its own.
    """
    if side <= tile:
        return [0]
    if tile < least_tile(reach):
        raise ValueError(f"tile {tile} is too small for a reach of {reach}: must be at least {least_tile(reach)}")
    strides = math.ceil((side - tile) / (tile - least_tile(reach) // 2))
    return [round(number * (side - tile) / strides) for number in range(strides + 1)]


def least_tile(reach: int) -> int:
    """The smallest tile for `spread`: the overlap, twice."""
    return 2 * (2 * reach + max(reach // 2, 1))


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    return [*_strides(side, tile, overlap), side - min(tile, side)]


def _strides(side: int, tile: int, overlap: float) -> range:
    """Where tiles start along a side, but for the last."""
    tile = min(tile, side)
    return range(0, side - tile, math.ceil(tile * overlap))
