"""Restoring a picture part by part: of what is as large as the picture, memory holds the latents alone.

    picture --rows enlarged--> tiles -> LQ encoder -> features on disk \\
                               tiles -> VAE encoder -> start latent     > every step: tiles -> UNet -> guidance -> blend
    latents -> tiles -> decoder -> picture on disk, at eight bits -> colour fix -> rows

The arithmetic is that of `restoration`, and so is the result, but for rounding: sums are taken in another order.
"""

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Array, Float, Float32, Int64, UInt8

from faithdiff_jax.files import images
from faithdiff_jax.files.spill import Spill, check_room, spilled_size
from faithdiff_jax.inference import inputs as inputs_
from faithdiff_jax.inference.canvas import Canvas
from faithdiff_jax.inference.color import adain_levels, level_counts
from faithdiff_jax.inference.decoding import decoded_pieces
from faithdiff_jax.inference.inputs import SamplingInputs
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.inference.progress import timed
from faithdiff_jax.inference.stepwise import OnStep
from faithdiff_jax.inference.tile_captions import encode_captions
from faithdiff_jax.inference.tilewise import Look, denoise_by_tiles
from faithdiff_jax.inference.tiling import faded_pieces, vae_tiles

if TYPE_CHECKING:
    from faithdiff_jax.inference.pipeline import FaithDiff
    from faithdiff_jax.inference.restoration import Request

ROWS = 256
"""Of a picture that come together."""


class StreamedPicture:
    """A restored picture on disk, whose colours are fixed as its rows are read; as an array, it is read whole.

    Attributes:
        shape: (H, W, 3).
    """

    def __init__(self, model: "FaithDiff", canvas: Canvas, options: RestoreOptions, decoded: "Decoded"):
        """Take what `Decoded` has written."""
        self.shape = (*canvas.target, 3)
        self._model, self._canvas, self._options, self._decoded = model, canvas, options, decoded
        self._levels = None
        if options.color_fix == "adain":
            self._levels = adain_levels(decoded.counts, canvas_counts(canvas), canvas.tint)

    def bands(self) -> Iterator[UInt8[np.ndarray, "rows W 3"]]:
        """The picture from top to bottom, some rows at a time."""
        height, width, _ = self.shape
        reach = 2**self._options.wavelet_levels - 1 if self._options.color_fix == "wavelet" else 0
        rows = max(ROWS, reach)
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            first, last = max(start - reach, 0), min(stop + reach, height)
            ours = self._decoded.levels.read(first, 0, last - first, width)
            yield self._fixed(ours, first, last)[start - first : stop - first]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it, (H, W, 3) uint8."""
        return np.concatenate(list(self.bands())).astype(dtype or np.uint8, copy=False)

    def _fixed(self, ours: np.ndarray, first: int, last: int) -> np.ndarray:
        if self._levels is not None:
            return np.stack([self._levels[channel][ours[..., channel]] for channel in range(3)], axis=-1)
        if self._options.color_fix == "none":
            return ours
        enlarged = self._canvas.tinted(images.to_float(self._canvas.rows(first, last)))
        pair = images.to_float(ours)[None], enlarged[None]
        fixed = self._model.programs.fix_color(*pair, "wavelet", self._options.wavelet_levels, None)
        return images.to_uint8(np.asarray(fixed)[0])


class Decoded:
    """A decoded picture at eight bits, without padding.

    Attributes:
        levels: (H, W, 3) on disk.
        counts: (3, 256), how often each channel has each level.
    """

    def __init__(
        self,
        model: "FaithDiff",
        latents: Float[Array | np.ndarray, "1 h w c"],
        canvas: Canvas,
        options: RestoreOptions,
    ):
        """Decode the latents (1, h, w, c) in tiles, as `vae_tile` and `decoder_passes` say."""
        height, width = canvas.target
        self.levels = Spill((height, width, 3), np.uint8)
        self.counts = np.zeros((3, 256), np.int64)
        rows = functools.lru_cache(maxsize=1)(canvas.rows)
        for top, left, padded in decoded_pieces(model, np.asarray(latents), options):
            piece = padded[0, : max(height - top, 0), : max(width - left, 0)]
            if not piece.size:
                continue
            if model.config.decoder_output == "difference":
                enlarged = rows(top, top + piece.shape[0])[:, left : left + piece.shape[1]]
                piece = images.to_float(enlarged) + piece
            levels = images.to_uint8(piece)
            self.levels.write(top, left, levels)
            self.counts += level_counts(levels)


def canvas_counts(canvas: Canvas) -> Int64[np.ndarray, "3 256"]:
    """`level_counts` of the enlarged picture."""
    height = canvas.target[0]
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, height, ROWS):
        counts += level_counts(canvas.rows(start, min(start + ROWS, height)))
    return counts


def restore_streamed(
    model: "FaithDiff", request: "Request", options: RestoreOptions, on_step: OnStep | None = None
) -> tuple[StreamedPicture, dict[str, float]]:
    """Restore a picture part by part.

    Args:
        model: what restores it.
        request: the picture.
        options: of it, with `progressive` off.
        on_step: see `FaithDiff.restore`; previews are whole pictures.

    Returns:
        The picture, and the seconds of "encode", "denoise" and "decode".

    Raises:
        InputError: see `FaithDiff.restore`; or there is no room for what is kept on disk.
        Cancelled: `on_step` returned False.
    """
    seconds: dict[str, float] = {}
    canvas = Canvas.of(request.image, options, model.config, request.tint)
    check_room(spilled_size(_features_shape(model, canvas), np.float32) + spilled_size((*canvas.target, 3), np.uint8))
    with timed(seconds, "encode"):
        inputs = _inputs(model, request, canvas, options)
        features = _encoded_features(model, canvas, options)
    with timed(seconds, "denoise"):
        plan, inputs = inputs_.plan_and_complete(inputs, options, model.config, [canvas.exact_size])
        picture = functools.partial(_picture, model, canvas, options)
        look = None if on_step is None else Look(on_step, lambda latents: np.asarray(picture(latents)))
        latents = denoise_by_tiles(model, plan, inputs, features, look)
        features.close()
    with timed(seconds, "decode"):
        return picture(latents), seconds


def _picture(model: "FaithDiff", canvas: Canvas, options: RestoreOptions, latents: Any) -> StreamedPicture:
    return StreamedPicture(model, canvas, options, Decoded(model, latents, canvas, options))


def _inputs(model: "FaithDiff", request: "Request", canvas: Canvas, options: RestoreOptions) -> SamplingInputs:
    """The arrays of a picture, but for its features. Of all noise, what is used first is drawn and used up first."""
    factor = model.config.vae.factor
    shapes = inputs_.noise_shapes(options, model.config, canvas.size)
    if request.noise is not None:
        inputs_.check_noise(request.noise, options, shapes)
    inside = canvas.exact_size[0] // factor, canvas.exact_size[1] // factor
    seed = options.seed if request.seed is None else request.seed

    def noise(name: str) -> Any:
        if request.noise is not None:
            return request.noise[name]
        return inputs_.drawn_noise(shapes, seed, model.programs.normal, inside, only=name)[name]

    text, negative = encode_captions(model, request.caption, options.negative_caption)
    return SamplingInputs(
        features=None,
        text=text,
        negative=negative,
        start=_encoded(model, canvas, noise("encode"), options) if options.start == "lr" else None,
        noise=noise("start"),
        step_noise=noise("steps") if "steps" in shapes else None,
    )


def _tiles_of(canvas: Canvas, tile: int) -> Any:
    """(top, left) -> that tile of the padded picture, (1, h, w, 3) in [-1, 1]."""
    rows = functools.lru_cache(maxsize=1)(canvas.padded_rows)

    def cut(top: int, left: int) -> np.ndarray:
        band = rows(top, min(top + tile, canvas.size[0]))
        return images.to_float(band[:, left : left + tile])[None]

    return cut


def _features_shape(model: "FaithDiff", canvas: Canvas) -> tuple[int, int, int]:
    height, width = (side // model.config.vae.factor for side in canvas.size)
    return height, width, model.config.feature_channels


def _encoded_features(model: "FaithDiff", canvas: Canvas, options: RestoreOptions) -> Spill:
    """LQ features (h, w, F), on disk."""
    features = Spill(_features_shape(model, canvas), np.float32)
    tile, out_tile = vae_tiles(canvas.size, options.vae_tile, model.config.vae.factor, encode=True)
    encode = functools.partial(model.encode_lq, vae_tile=options.vae_tile)
    for top, left, piece in faded_pieces(encode, _tiles_of(canvas, tile), canvas.size, tile=tile, out_tile=out_tile):
        features.write(top, left, piece[0])
    return features


def _encoded(
    model: "FaithDiff", canvas: Canvas, noise: Float[Any, "1 h w c"], options: RestoreOptions
) -> Float32[np.ndarray, "1 h w c"]:
    """What `model.encode` gives, with the moments of one row of tiles at a time."""
    tile, out_tile = vae_tiles(canvas.size, options.vae_tile, model.config.vae.factor, encode=True)
    moments = functools.partial(model.programs.moments, model.params["vae"])
    latents = np.empty(np.shape(noise), np.float32)
    band = np.empty((1, out_tile, latents.shape[2], 2 * latents.shape[3]), np.float32)
    for top, left, piece in faded_pieces(moments, _tiles_of(canvas, tile), canvas.size, tile=tile, out_tile=out_tile):
        height, width = piece.shape[1:3]
        band[:, :height, left : left + width] = piece
        if left + width == latents.shape[2]:  # the last of its row
            rows = slice(top, top + height)
            latents[:, rows] = model.programs.draw(model.params["vae"], band[:, :height], np.asarray(noise)[:, rows])
    return latents
