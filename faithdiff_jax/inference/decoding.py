"""Decoding latents larger than a tile, in one of two ways.

As published, each tile is decoded as a picture of its own and cross-faded with its neighbours. Otherwise, passes over
all tiles find the statistics of the decoder's norms for the whole picture first, and tiles overlap by more than the
decoder reaches: what is decoded is the same, whichever tile it is in, but for the attention in the decoder's middle,
which sees one tile. The scheme is that of Tiled VAE (multidiffusion-upscaler-for-automatic1111), which finds the
statistics in a small version of the picture.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Array, Float, Float32

from faithdiff_jax.inference.grid import spread
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.inference.tiling import faded_pieces, vae_tiles
from faithdiff_jax.models.norms import Moments

if TYPE_CHECKING:
    from faithdiff_jax.inference.pipeline import FaithDiff

Pieces = Iterator[tuple[int, int, Float32[np.ndarray, "b h w 3"]]]


@dataclasses.dataclass(frozen=True)
class Window:
    """A tile along one side of the latents.

    Attributes:
        start: where it begins, in latent pixels.
        own: (tile,), 1 where a latent pixel is this tile's own and no other's.
        weights: (tile * factor,), of its pixels where tiles overlap; of all tiles they add up to 1.
    """

    start: int
    own: Float32[np.ndarray, " tile"]
    weights: Float32[np.ndarray, " pixels"]


def decode(
    model: "FaithDiff", latents: Float[Array | np.ndarray, "b h w c"], options: RestoreOptions
) -> Float[Array | np.ndarray, "b H W 3"]:
    """Scaled latents (B, h, w, c) -> images (B, H, W, 3), about [-1, 1], as `vae_tile` and `decoder_passes` say."""
    if not _by_windows(model, latents, options):
        return model.decode(latents, vae_tile=options.vae_tile)
    return np.concatenate([piece for _, _, piece in decoded_pieces(model, np.asarray(latents), options)], axis=1)


def decoded_pieces(model: "FaithDiff", latents: Float[np.ndarray, "b h w c"], options: RestoreOptions) -> Pieces:
    """The same in pieces that follow one another, row by row, each with its corner in pixels."""
    if _by_windows(model, latents, options):
        return _decoded_windows(model, latents, options)
    tile, out_tile = vae_tiles(latents.shape[1:3], options.vae_tile, model.config.vae.factor, encode=False)
    return faded_pieces(
        functools.partial(model.decode, vae_tile=options.vae_tile),
        lambda top, left: latents[:, top : top + tile, left : left + tile],
        latents.shape[1:3],
        tile=tile,
        out_tile=out_tile,
    )


def windows(side: int, tile: int, factor: int, reach: int) -> list[Window]:
    """Tiles over a side of the latents, evenly spread, that overlap by `reach` at either end of a fade.

    Args:
        side: of the latents.
        tile: of a tile; all have this side, or that of the latents if it is smaller.
        factor: image pixels per latent pixel.
        reach: how far, in latent pixels, the ends of a tile are decoded otherwise than inside a picture.

    Raises:
        ValueError: see `grid.spread`.
    """
    starts, tile = spread(side, tile, reach), min(tile, side)
    found = []
    for number, start in enumerate(starts):
        own, weights = np.ones(tile, np.float32), np.ones(tile * factor, np.float32)
        if number:
            shared = starts[number - 1] + tile - start
            own[: shared // 2] = 0
            weights[: shared * factor] = _rise(shared * factor, reach * factor)
        if number < len(starts) - 1:
            shared = start + tile - starts[number + 1]
            own[tile - shared + shared // 2 :] = 0
            weights[-shared * factor :] = 1 - _rise(shared * factor, reach * factor)
        found.append(Window(start, own, weights))
    return found


def _rise(length: int, reach: int) -> Float32[np.ndarray, " {length}"]:
    """0 over the first `reach` pixels and 1 over the last, a line between them."""
    places = np.arange(length) + 0.5
    return np.clip((places - reach) / (length - 2 * reach), 0, 1).astype(np.float32)


def _by_windows(model: "FaithDiff", latents: Any, options: RestoreOptions) -> bool:
    return options.decoder_passes > 0 and max(latents.shape[1:3]) * model.config.vae.factor > options.vae_tile


def _decoded_windows(model: "FaithDiff", latents: np.ndarray, options: RestoreOptions) -> Pieces:
    factor, params = model.config.vae.factor, model.params["vae"]
    sides = latents.shape[1:3]
    tile = options.vae_tile // factor
    down, across = (windows(side, tile, factor, model.config.vae.decoder_reach) for side in sides)

    def cut(row: Window, column: Window) -> np.ndarray:
        height, width = len(row.own), len(column.own)
        return latents[:, row.start : row.start + height, column.start : column.start + width]

    given: list[Moments] | None = None
    for _ in range(options.decoder_passes):
        found = []
        for row, column in itertools.product(down, across):
            moments = model.programs.norms(params, cut(row, column), given, row.own, column.own)
            found.append((float(row.own.sum() * column.own.sum()), moments))
        given = merged(found)
    rest = np.zeros((latents.shape[0], 0, sides[1] * factor, 3), np.float32)
    for number, row in enumerate(down):
        band = np.zeros((latents.shape[0], len(row.weights), sides[1] * factor, 3), np.float32)
        for column in across:
            decoded = model.programs.decode_normed(params, cut(row, column), given, row.own, column.own)
            places = slice(column.start * factor, column.start * factor + len(column.weights))
            band[:, :, places] += np.asarray(decoded) * column.weights[None, None, :, None]
        band *= row.weights[None, :, None, None]
        band[:, : rest.shape[1]] += rest
        following = (down[number + 1].start - row.start) * factor if number + 1 < len(down) else band.shape[1]
        yield row.start * factor, 0, band[:, :following]
        rest = band[:, following:]


def merged(found: Sequence[tuple[float, Sequence[Moments]]]) -> list[Moments]:
    """The moments of a picture from those of its tiles, each with the number of its pixels."""
    weights = np.array([pixels for pixels, _ in found])
    weights = (weights / weights.sum())[:, None, None]
    together = []
    for of_norm in zip(*(moments for _, moments in found), strict=True):
        means, variances = (np.stack([np.asarray(x, np.float64) for x in each]) for each in zip(*of_norm, strict=True))
        mean = (means * weights).sum(axis=0)
        variance = ((variances + (means - mean) ** 2) * weights).sum(axis=0)
        together.append(Moments(mean.astype(np.float32), variance.astype(np.float32)))
    return together
