"""From pictures to restored pictures: one at a time, or those of one padded size together.

    picture -> Canvas -> LQ features, start latent \
    caption -> context, pooled                      > SamplingInputs --joined--> denoise -> decode, colours -> picture
    seed -> noise                                  /

Encoders and decoder see one picture at a time, so that they are one program whatever the batch; denoising, which is
nearly all of the time, is of the whole batch.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from faithdiff_jax.errors import InputError
from faithdiff_jax.files import images
from faithdiff_jax.files.captions import Caption
from faithdiff_jax.inference import inputs as inputs_
from faithdiff_jax.inference.canvas import Canvas
from faithdiff_jax.inference.color import Tint
from faithdiff_jax.inference.decoding import decode
from faithdiff_jax.inference.inputs import SamplingInputs
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.inference.progress import timed
from faithdiff_jax.inference.stepwise import OnStep, sample_stepwise
from faithdiff_jax.inference.streaming import StreamedPicture, restore_streamed
from faithdiff_jax.inference.tile_captions import check_caption, encode_captions
from faithdiff_jax.models.config import FaithDiffConfig

if TYPE_CHECKING:
    from faithdiff_jax.inference.pipeline import FaithDiff

Words = Float[Array | np.ndarray, "1 m words"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A picture to restore.

    Attributes:
        image: (h, w, 3), of any size.
        caption: what it shows, or what each of its tiles does; see `tile_captions`.
        seed: of its noise; None for that of the options.
        noise: instead of a seed, as `FaithDiff.restore` has it.
        tint: the colours that the colour fix lends the result, instead of the picture's own; see `frames`.
    """

    image: UInt8[np.ndarray, "h w 3"]
    caption: Caption = ""
    seed: int | None = None
    noise: Mapping[str, Any] | None = None
    tint: Tint | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """A picture restored.

    Attributes:
        image: (round(h * scale), round(w * scale), 3); one that was worked on by parts comes by rows, or as an array.
        seconds: spent on it by stage: "encode", "denoise" (its share of the batch's), "decode".
        maps: (h, w, W) of words at the latents' resolution, if they were asked for.
    """

    image: UInt8[np.ndarray, "H W 3"] | StreamedPicture
    seconds: dict[str, float]
    maps: Any = None


def pictures_together(options: RestoreOptions, config: FaithDiffConfig, size: tuple[int, int]) -> int:
    """How many pictures of a padded size in pixels are one batch: as many as `options.batch` tiles hold.

    An aligner that mixes the pictures of a batch, as in the published training code, gets one at a time; and a picture
    that is worked on by parts is alone.
    """
    if options.streams(size):
        return 1
    height, width = (side // config.vae.factor for side in size)
    return 1 if config.alignment.mixing == "batch" else max(1, options.batch // options.count_tiles(height, width))


def restore_all(
    model: "FaithDiff",
    requests: Sequence[Request],
    options: RestoreOptions,
    *,
    words: Words | None = None,
    on_step: OnStep | None = None,
) -> list[Restored]:
    """Restore pictures of any sizes, those of one padded size together, `options.batch` tiles at a time.

    Args:
        model: what restores them.
        requests: the pictures.
        options: for all of them.
        words: to attribute to, of one picture alone; see `FaithDiff.attribute`.
        on_step: of pictures that are one batch; see `stepwise.OnStep`.

    Raises:
        InputError: see `FaithDiff.restore`.
    """
    options.check_against(model.config)
    for request in requests:
        size = options.padded_size(model.config, *request.image.shape[:2])  # the last pass is the largest
        if words is not None and options.streams(size):
            limit = f"more than stream_above, {options.stream_above:,}"
            raise InputError(f"attribution: {size[1]}x{size[0]} pixels are {limit}, which have no maps")
        check_caption(request.caption, options, model.config, request.image.shape[:2])
    scales = options.enlargements
    if len(scales) > 1 and any(request.noise is not None for request in requests):
        raise InputError("progressive is true: takes a seed, not noise, which would be of several sizes")
    seconds = [collections.Counter[str]() for _ in requests]
    for number, scale in enumerate(scales, 1):
        last, of_pass = number == len(scales), options.replace(scale=scale, progressive=False)
        look = None if on_step is None else _counted_on(on_step, number - 1, len(scales))
        results = _restore_pass(model, requests, of_pass, words=words if last else None, on_step=look)
        for spent, one in zip(seconds, results, strict=True):
            spent.update(one.seconds)
        if not last:
            images_ = [np.asarray(one.image) for one in results]  # in their colours already
            requests = [
                dataclasses.replace(one, image=image, tint=None) for one, image in zip(requests, images_, strict=True)
            ]
    return [dataclasses.replace(one, seconds=dict(spent)) for one, spent in zip(results, seconds, strict=True)]


def _counted_on(on_step: OnStep, done: int, passes: int) -> OnStep:
    """`on_step` for one of several passes, which tells it the steps of all."""
    return lambda step, steps, preview: on_step(done * steps + step, passes * steps, preview)


def _restore_pass(
    model: "FaithDiff", requests: Sequence[Request], options: RestoreOptions, *, words: Words | None, on_step: Any
) -> list[Restored]:
    """`restore_all` at once, whatever the scale."""
    by_size: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    for number, request in enumerate(requests):
        by_size[options.padded_size(model.config, *request.image.shape[:2])].append(number)
    found: dict[int, Restored] = {}
    for size, numbers in by_size.items():
        if options.streams(size):
            for number in numbers:
                image, seconds = restore_streamed(model, requests[number], options, on_step)
                found[number] = Restored(image=image, seconds=seconds)
            continue
        count = pictures_together(options, model.config, size)
        for first in range(0, len(numbers), count):
            part = numbers[first : first + count]
            batch = [requests[number] for number in part]
            restored = _restore_batch(model, batch, options, words=words, on_step=on_step)
            found.update(zip(part, restored, strict=True))
    return [found[number] for number in range(len(requests))]


def _restore_batch(
    model: "FaithDiff", requests: Sequence[Request], options: RestoreOptions, *, words: Words | None, on_step: Any
) -> list[Restored]:
    """Restore pictures of one padded size in one batch.

    The batch is filled up to a power of two, so that few sizes of batch are compiled.
    """
    seconds: dict[str, float] = {}
    with timed(seconds, "encode"):
        canvases = [Canvas.of(request.image, options, model.config, request.tint) for request in requests]
        rows = [_encode(model, *pair, options) for pair in zip(requests, canvases, strict=True)]
        if any(row.text.by_tile for row in rows):
            tiles = len(inputs_.plan_sampling(options, model.config.schedule, *rows[0].noise.shape[1:3]).corners)
            rows = [dataclasses.replace(row, text=row.text.of_each_tile(tiles)) for row in rows]
        surplus = (1 << (len(rows) - 1).bit_length()) - len(rows)
        inputs = rows[0] if len(rows) == 1 else model.programs.join(None, rows + rows[-1:] * surplus)
        jax.block_until_ready(inputs)
    sizes = [canvas.exact_size for canvas in canvases + canvases[-1:] * surplus]
    with timed(seconds, "denoise"):
        if on_step is None:
            latents, maps = model.sample_inputs(inputs, options, sizes, words)
        else:
            plan, inputs = inputs_.plan_and_complete(inputs, options, model.config, sizes)

            def look(clean: Array, number: int = 0) -> UInt8[np.ndarray, "H W 3"]:
                return _decode(model, _row(clean, number), canvas=canvases[number], options=options)

            latents = sample_stepwise(model.programs, model.denoiser_params, plan, inputs, on_step, look)
            maps = None
        jax.block_until_ready(latents)
    each = [_row(latents, number) for number in range(len(rows))]
    with timed(seconds, "decode"):
        pictures = [
            _decode(model, one, canvas=canvas, options=options) for one, canvas in zip(each, canvases, strict=True)
        ]
    shares = {stage: spent / len(rows) for stage, spent in seconds.items()}
    return [Restored(image=picture, seconds=shares, maps=maps) for picture in pictures]


def _encode(model: "FaithDiff", request: Request, canvas: Canvas, options: RestoreOptions) -> SamplingInputs:
    """The arrays of one picture."""
    padded, noise, factor = canvas.padded(), request.noise, model.config.vae.factor
    shapes = inputs_.noise_shapes(options, model.config, canvas.size)
    if noise is None:
        inside = canvas.exact_size[0] // factor, canvas.exact_size[1] // factor
        seed = options.seed if request.seed is None else request.seed
        noise = inputs_.drawn_noise(shapes, seed, model.programs.normal, inside)
    inputs_.check_noise(noise, options, shapes)
    text, negative = encode_captions(model, request.caption, options.negative_caption)
    from_lq = options.start == "lr"
    return SamplingInputs(
        features=model.encode_lq(padded, vae_tile=options.vae_tile),
        text=text,
        negative=negative,
        noise=noise["start"],
        start=model.encode(padded, noise["encode"], vae_tile=options.vae_tile) if from_lq else None,
        step_noise=noise.get("steps"),
    )


def _row(latents: Array, number: int) -> Array | np.ndarray:
    """One picture's latents, as a batch of one; cut out on the host, where that takes no program."""
    return latents if latents.shape[0] == 1 else np.asarray(latents)[number : number + 1]


def _decode(
    model: "FaithDiff", latents: Array | np.ndarray, *, canvas: Canvas, options: RestoreOptions
) -> UInt8[np.ndarray, "H W 3"]:
    """The picture of latents (1, h, w, c), without the padding and with the colours of the upscaled input."""
    decoded = np.asarray(decode(model, latents, options))[0]
    height, width = canvas.upscaled.shape[:2]
    if canvas.size == canvas.exact_size:
        decoded, enlarged, sizes = images.crop(decoded, height, width), images.to_float(canvas.upscaled), None
    else:  # in the padding, so that pictures of one padded size share the colour fix too
        enlarged, sizes = canvas.padded()[0], np.array([[height, width]], np.int32)
    if model.config.decoder_output == "difference":
        decoded = enlarged + decoded
    # As published, colours are fixed on the picture at eight bits, against the upscaled input.
    ours = images.to_float(images.to_uint8(decoded))
    pair = ours[None], canvas.tinted(enlarged)[None]
    fixed = model.programs.fix_color(*pair, options.color_fix, options.wavelet_levels, sizes)
    return images.to_uint8(images.crop(np.asarray(fixed)[0], height, width))
