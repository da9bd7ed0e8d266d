"""Tiles: how they are cut out, weighted and put together. Knows arrays and callables, no model.

Two schemes, as published. Latents are cut into tiles of one size, denoised and averaged with Gaussian weights at every
step, on the device. The encoder and the decoder see one tile at a time, and their outputs are cross-faded on the host.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.grid import Corners


def gaussian_weights(height: int, width: int) -> Float32[np.ndarray, "{height} {width}"]:
    """Weights of a tile's pixels: a Gaussian of variance 0.01 in units of tile sides.

    Its centre is (width - 1) / 2 across but height / 2 down, half a pixel low: the published `_gaussian_weights`
    does so, and the tiles' blend depends on it.
    """
    return np.outer(_gaussian(height, height / 2), _gaussian(width, (width - 1) / 2)).astype(np.float32)


def gather_tiles(
    array: Float[Array | np.ndarray, "b h w c"],
    corners: Corners | Int[Array, "tiles 2"],
    tile_height: int,
    tile_width: int,
) -> Float[Array, "tiles b {tile_height} {tile_width} c"]:
    """Cut (B, H, W, C) into tiles (T, B, tile_height, tile_width, C).

    Sizes are static under jit; corners may be a traced (T, 2) array, to cut out a few tiles at a time. Raises
    ValueError if a tile of static corners does not lie inside the array; traced ones must come from `latent_grid`.
    """
    if isinstance(corners, tuple):
        _check_inside(corners, (tile_height, tile_width), array.shape[1:3])
        corners = jnp.asarray(corners, jnp.int32)
    batch, _, _, channels = array.shape

    def cut(corner: Array) -> Array:
        return jax.lax.dynamic_slice(array, (0, corner[0], corner[1], 0), (batch, tile_height, tile_width, channels))

    tiles: Array = jax.lax.map(cut, corners)
    return tiles


def blend_tiles(
    tiles: Float[Array | np.ndarray, "tiles b h w c"],
    corners: Corners,
    weights: Float[Array | np.ndarray, "tile_h tile_w"],
    height: int,
    width: int,
) -> Float[Array, "b {height} {width} c"]:
    """Weighted average of tiles (T, B, h, w, C) where they overlap, as (B, height, width, C) in the tiles' dtype.

    `weights` is (h, w), positive; sums are float32. Corners and sizes are static under jit; every pixel must be
    covered by a tile. Raises ValueError if a tile lies outside, or the counts or sizes disagree.
    """
    count, batch, tile_height, tile_width, channels = tiles.shape
    if len(corners) != count or weights.shape != (tile_height, tile_width):
        raise ValueError(f"tiles {tiles.shape} do not go with {len(corners)} corners and weights {weights.shape}")
    _check_inside(corners, (tile_height, tile_width), (height, width))
    pixels = jnp.asarray(weights, jnp.float32)[None, :, :, None]

    def add(total: Array, start: tuple[Any, ...], tile: Array) -> Array:
        window = jax.lax.dynamic_slice(total, start, tile.shape)
        return jax.lax.dynamic_update_slice(total, window + tile, start)

    def step(totals: tuple[Array, Array], pair: tuple[Any, Any]) -> tuple[tuple[Array, Array], None]:
        corner, tile = pair
        start = (0, corner[0], corner[1], 0)
        weighted = tile.astype(jnp.float32) * pixels
        return (add(totals[0], start, weighted), add(totals[1], start, pixels)), None

    zeros = jnp.zeros((batch, height, width, channels), jnp.float32), jnp.zeros((1, height, width, 1), jnp.float32)
    (total, weight), _ = jax.lax.scan(step, zeros, (jnp.asarray(corners, jnp.int32), tiles))
    return (total / weight).astype(tiles.dtype)


def vae_tiles(size: tuple[int, ...], vae_tile: int, factor: int, encode: bool) -> tuple[int, int]:
    """Side of a tile that the encoder or the decoder takes, and of what it makes of it: image pixels, latent pixels.

    Args:
        size: height and width of what goes in.
        vae_tile: side in image pixels.
        factor: image pixels per latent pixel.
        encode: whether it is the encoder that runs.

    Raises:
        InputError: a tile whose overlaps are no whole latent pixels, or an image whose sides are not.
    """
    if vae_tile % (4 * factor):
        raise InputError(f"vae_tile is {vae_tile}: must be a multiple of {4 * factor} for this model")
    if not encode:
        return vae_tile // factor, vae_tile
    if any(side % factor for side in size):
        raise InputError(f"images are {size[0]}x{size[1]}: both sides must be multiples of {factor}")
    return vae_tile, vae_tile // factor


def fade_tiles(
    apply: Callable[[np.ndarray], Array | np.ndarray],
    array: Float[Array | np.ndarray, "b h w c"],
    *,
    tile: int,
    out_tile: int,
    overlap: float = 0.25,
) -> Float32[np.ndarray, "b out_h out_w out_c"]:
    """`faded_pieces` of (B, H, W, C), put together: float32 (B, H * out_tile / tile, W * out_tile / tile, C')."""
    array = np.asarray(array)
    batch, height, width, _ = array.shape
    cut = lambda top, left: array[:, top : top + tile, left : left + tile]  # noqa: E731
    out = np.empty((batch, 0, 0, 0), np.float32)
    for top, left, piece in faded_pieces(apply, cut, (height, width), tile=tile, out_tile=out_tile, overlap=overlap):
        if not out.size:
            out = np.empty((batch, height * out_tile // tile, width * out_tile // tile, piece.shape[3]), np.float32)
        out[:, top : top + piece.shape[1], left : left + piece.shape[2]] = piece
    return out


def faded_pieces(
    apply: Callable[[np.ndarray], Array | np.ndarray],
    cut: Callable[[int, int], np.ndarray],
    size: tuple[int, int],
    *,
    tile: int,
    out_tile: int,
    overlap: float = 0.25,
) -> Iterator[tuple[int, int, Float32[np.ndarray, "b h w c"]]]:
    """Run an encoder or a decoder over tiles and cross-fade its outputs linearly, on the host.

    Each tile fades into the one above, then into the one to the left, both already faded (diffusers' AutoencoderKL
    .tiled_encode and .tiled_decode). Memory holds one tile, the one before, and the last rows of those above.

    Args:
        apply: maps one tile (B, h, w, C) to (B, h * out_tile / tile, w * out_tile / tile, C').
        cut: gives the tile (B, h, w, C) at a corner; those that reach past the right or bottom are smaller: the last
            two of a row or column at a quarter's overlap, so that `apply` sees at most nine shapes.
        size: height and width of what is cut; if it is no larger than a tile, it is passed whole.
        tile: side of a full tile.
        out_tile: side of what it becomes.
        overlap: the part of a tile that is shared with a neighbour.

    Yields:
        Pieces of the result and the corner where each belongs, row by row; together they are all of it.

    Raises:
        ValueError: overlap is outside [0, 1), sizes do not come out whole, or `apply` returns another size.
    """
    height, width = size
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap {overlap} is the shared part of a tile, it must lie in [0, 1)")
    step, fade = int(tile * (1 - overlap)), int(out_tile * overlap)
    kept = out_tile - fade
    # Published code would return a picture of another size here; such tile sizes are refused instead.
    if step < 1 or step * out_tile != kept * tile:
        raise ValueError(f"tile {tile}, out_tile {out_tile} and overlap {overlap} do not share a whole stride")
    if height * out_tile % tile or width * out_tile % tile:
        raise ValueError(f"{height}x{width} times {out_tile}/{tile} is not a whole size")

    def run(top: int, left: int) -> np.ndarray:
        part = cut(top, left)
        result = np.array(apply(part), np.float32)  # a copy: fading writes into it
        expected = tuple(side * out_tile // tile for side in part.shape[1:3])
        if result.shape[1:3] != expected:
            raise ValueError(f"apply turned {part.shape} into {result.shape}, its size should be {expected}")
        return result

    if height <= tile and width <= tile:
        yield 0, 0, run(0, 0)
        return
    above: list[np.ndarray] = []
    for i, top in enumerate(range(0, height, step)):
        ends: list[np.ndarray] = []
        before: np.ndarray | None = None
        for j, left in enumerate(range(0, width, step)):
            faded = run(top, left)
            if i > 0:
                _fade(above[j], faded, fade, axis=1)
            if before is not None:
                _fade(before, faded, fade, axis=2)
            # The rest of the tile belongs to its neighbours, which fade it into their own.
            yield i * kept, j * kept, faded[:, :kept, :kept]
            ends.append(faded[:, max(faded.shape[1] - fade, 0) :].copy())
            before = faded
        above = ends


def _gaussian(side: int, centre: float) -> np.ndarray:
    distance = (np.arange(side, dtype=np.float64) - centre) / side
    return np.exp(-(distance**2) / (2 * 0.01)) / math.sqrt(2 * math.pi * 0.01)


def _check_inside(corners: Corners, tile: tuple[int, int], size: tuple[int, ...]) -> None:
    # Dynamic slices move silently inside when they reach out, so it is checked here.
    for top, left in corners:
        if top < 0 or left < 0 or top + tile[0] > size[0] or left + tile[1] > size[1]:
            raise ValueError(f"tile {tile[0]}x{tile[1]} at ({top}, {left}) lies outside {size[0]}x{size[1]}")


def _fade(before: np.ndarray, after: np.ndarray, extent: int, axis: int) -> None:
    """Fade the end of `before` into the start of `after`, in place, along an axis of (B, H, W, C)."""
    extent = min(after.shape[axis], extent)  # a sliver at the edge; `before` ends where it ends, and is longer
    if extent == 0:
        return
    rise = np.arange(extent) / extent
    shape = [extent if axis == other else 1 for other in range(4)]
    end, start = [slice(None)] * 4, [slice(None)] * 4
    end[axis], start[axis] = slice(-extent, None), slice(extent)
    falling, rising = (1 - rise).astype(np.float32).reshape(shape), rise.astype(np.float32).reshape(shape)
    after[tuple(start)] = before[tuple(end)] * falling + after[tuple(start)] * rising
