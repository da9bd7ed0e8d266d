"""Whether tiles can be seen in a restored picture: the jump across their borders beside the jump elsewhere.

The jump at a line between two pixels is the mean, along the line and over the channels, of how far the difference
across it is from the differences on either side: what is in the picture anyway, a slope, does not count. The jump at
the borders of tiles is compared with 9,999 random sets of as many lines at the same places of the latent grid: `p` is
the share of sets whose mean is as large. Tiles that cannot be seen have any p from 0 to 1; below 0.01 they can be told.
The picture is what the decoder gives, before it is rounded to eight bits.

    python benchmarks/seams.py [PHOTOGRAPH ...] [--model DIR] [--side 1024]
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from faithdiff_jax import SMALL_MODEL, FaithDiff
from faithdiff_jax.files import images
from faithdiff_jax.inference.decoding import decode, windows
from faithdiff_jax.inference.grid import latent_grid
from faithdiff_jax.inference.options import RestoreOptions

Borders = tuple[list[int], list[int]]
"""Rows and columns before which a tile begins or ends, or a fade does, in pixels."""
DRAWS = 9999


def jumps(picture: np.ndarray, axis: int) -> np.ndarray:
    """(H, W, C) -> for each row or column, the jump before it; NaN where there are no two on either side."""
    across = np.moveaxis(np.asarray(picture, np.float64), axis, 0)
    slopes = np.diff(across, axis=0)
    inside = np.abs(slopes[1:-1] - (slopes[:-2] + slopes[2:]) / 2).mean(axis=(1, 2))
    return np.pad(inside, (2, 1), constant_values=np.nan)


def seam_test(picture: np.ndarray, borders: Borders, phase: int, seed: int = 0) -> tuple[float, float]:
    """The mean jump at borders, as a multiple of that elsewhere, and its p; of lines at multiples of `phase` alone."""
    at, elsewhere = [], []
    for axis, places in enumerate(borders):
        found = jumps(picture, axis)
        lines = np.arange(0, len(found), phase)
        lines = lines[np.isfinite(found[lines])]
        here = np.isin(lines, places)
        at.append(found[lines[here]])
        elsewhere.append(found[lines[~here]])
    observed, rng = float(np.concatenate(at).mean()), np.random.default_rng(seed)
    drawn = np.zeros(DRAWS)
    for found, here in zip(elsewhere, at, strict=True):
        order = rng.random((DRAWS, len(found))).argpartition(max(len(here) - 1, 0), axis=1)[:, : len(here)]
        drawn += found[order].sum(axis=1)
    drawn /= sum(map(len, at))
    ratio = observed / float(np.concatenate(elsewhere).mean())
    return ratio, (1 + int((drawn >= observed).sum())) / (1 + DRAWS)


def denoising_borders(size: tuple[int, int], options: RestoreOptions, factor: int) -> Borders:
    """Where tiles of the latents begin and end."""
    height, width = (side // factor for side in size)
    corners = latent_grid(height, width, options.tile, options.overlap)
    found = []
    for axis, side in enumerate((height, width)):
        places = {corner[axis] + end for corner in corners for end in (0, min(options.tile, side))}
        found.append(sorted(place * factor for place in places - {0, side}))
    return found[0], found[1]


def decoding_borders(size: tuple[int, int], options: RestoreOptions, model: FaithDiff) -> Borders:
    """Where tiles of the decoder, or the fades between them, begin and end."""
    factor, tile = model.config.vae.factor, options.vae_tile
    found = []
    for side in size:
        if options.decoder_passes:
            reach = model.config.vae.decoder_reach
            ends = set()
            for window in windows(side // factor, tile // factor, factor, reach):
                faded = (window.weights > 0) & (window.weights < 1)
                ends |= {window.start * factor + int(place) for place in np.flatnonzero(np.diff(faded)) + 1}
        else:
            starts = range(0, side, tile * 3 // 4)
            ends = {start + end for start in starts for end in (0, tile // 4)}
        found.append(sorted(place for place in ends if 0 < place < side))
    return found[0], found[1]


def gradient(side: int) -> np.ndarray:
    """A picture whose channels rise across, down and along."""
    down, across = np.mgrid[:side, :side] / (side - 1)
    return np.stack([across, down, (down + across) / 2], axis=-1)


Latents = Callable[[RestoreOptions], np.ndarray]


def latents_of(model: FaithDiff, picture: np.ndarray, side: int) -> Latents:
    """Options -> denoised latents of a picture, encoded whole."""
    square = min(picture.shape[:2])
    low = np.rint(picture[:square, :square] * 255).astype(np.uint8)
    image = images.to_float(images.upscale(low, side / square))[None]
    factor = model.config.vae.factor
    shape = (1, side // factor, side // factor, model.config.vae.latent_channels)
    rng = np.random.default_rng(0)
    noise, encoding = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    features = model.encode_lq(image, vae_tile=2**14)
    start = model.encode(image, encoding, vae_tile=2**14)
    context, pooled = model.encode_text(["", ""])
    texts = context[:1], pooled[:1], context[1:], pooled[1:]

    @functools.cache
    def latents(options: RestoreOptions) -> np.ndarray:
        return np.asarray(model.sample(features, *texts, noise, options, start=start))

    return latents


def modes(model: FaithDiff, side: int, tile: int, vae_tile: int) -> Iterator[tuple[str, RestoreOptions, Borders]]:
    """Name, options, and the borders that are looked at."""
    whole = model.defaults.replace(tile=2**14, vae_tile=2**14)
    size, factor = (side, side), model.config.vae.factor
    published = whole.replace(tile=tile, overlap=0.5)
    yield "whole, at the places of the next", whole, denoising_borders(size, published, factor)
    for overlap in (0.5, 0.75, 1.0):
        options = published.replace(overlap=overlap)
        yield f"denoised in tiles, overlap {overlap:g}", options, denoising_borders(size, options, factor)
    for passes in (0, 1, 2, 4):
        options = whole.replace(vae_tile=vae_tile, decoder_passes=passes)
        yield f"decoded in tiles, {passes} passes", options, decoding_borders(size, options, model)
    both = published.replace(vae_tile=vae_tile)
    borders = zip(denoising_borders(size, both, factor), decoding_borders(size, both, model), strict=True)
    rows, columns = (sorted({*one, *other}) for one, other in borders)
    yield "both, overlap 0.5, 0 passes", both, (rows, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", nargs="*", type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path, default=SMALL_MODEL)
    parser.add_argument("--side", type=int, default=1024, help="of the result, in pixels")
    parser.add_argument("--tile", type=int, default=32, help="of denoising, in latent pixels")
    parser.add_argument("--vae-tile", type=int, default=256, help="of decoding, in pixels")
    arguments = parser.parse_args()
    model = FaithDiff.load(arguments.model)
    pictures: dict[str, Any] = {"gradient": gradient(arguments.side // 2)}
    for path in arguments.photographs:
        pictures[path.stem] = images.load_image(path).rgb / 255
    print(f"{'':36} {'picture':>12} {'borders':>8} {'jump / elsewhere':>17} {'p':>7}", flush=True)
    for name, picture in pictures.items():
        of = latents_of(model, picture, arguments.side)
        for mode, options, borders in modes(model, arguments.side, arguments.tile, arguments.vae_tile):
            decoded = np.asarray(decode(model, of(options.replace(vae_tile=2**14, decoder_passes=0)), options))[0]
            ratio, p = seam_test(decoded, borders, model.config.vae.factor)
            count = sum(map(len, borders))
            print(f"{mode:36} {name:>12} {count:>8} {ratio:>17.3f} {p:>7.4f}", flush=True)


if __name__ == "__main__":
    main()
