"""From pictures to restored pictures: one at a time, or those of one padded size together.

    picture -> Canvas -> LQ features, start latent \
    caption -> context, pooled                      > SamplingInputs --joined--> denoise -> decode, colours -> picture
    seed -> noise                                  /

Encoders and decoder see one picture at a time, on a mesh one a device, so that they are one program whatever the batch;
denoising, which is nearly all of the time, is of the whole batch.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from faithdiff_jax.errors import InputError
from faithdiff_jax.files import images
from faithdiff_jax.files.captions import Caption
from faithdiff_jax.inference import inputs as inputs_
from faithdiff_jax.inference.canvas import Canvas
from faithdiff_jax.inference.color import Tint
from faithdiff_jax.inference.decoding import decode
from faithdiff_jax.inference.inputs import SamplingInputs, Text
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
    count = 1 << (len(requests) - 1).bit_length()
    together = _seen_together(model, requests, count)
    with timed(seconds, "encode"):
        canvases = [Canvas.of(request.image, options, model.config, request.tint) for request in requests]
        pairs = list(zip(requests, canvases, strict=True))
        if together > 1:  # devices that would be idle take the surplus
            pairs += pairs[-1:] * (count - len(pairs))
        rows = [_encode(model, pairs[i : i + together], options) for i in range(0, len(pairs), together)]
        rows += rows[-1:] * (count // together - len(rows))
        if any(row.text.by_tile for row in rows):
            tiles = len(inputs_.plan_sampling(options, model.config.schedule, *rows[0].noise.shape[1:3]).corners)
            rows = [dataclasses.replace(row, text=row.text.of_each_tile(tiles)) for row in rows]
        inputs = rows[0] if len(rows) == 1 else model.programs.join(None, rows)
        jax.block_until_ready(inputs)
    sizes = [canvas.exact_size for canvas in canvases + canvases[-1:] * (count - len(canvases))]
    with timed(seconds, "denoise"):
        if on_step is None:
            latents, maps = model.sample_inputs(inputs, options, sizes, words)
        else:
            plan, inputs = inputs_.plan_and_complete(inputs, options, model.config, sizes)

            def look(clean: Array, number: int = 0) -> UInt8[np.ndarray, "H W 3"]:
                return _decode(model, _rows(clean, number, 1), canvases[number : number + 1], options)[0]

            latents = sample_stepwise(model.programs, model.denoiser_params, plan, inputs, on_step, look)
            maps = None
        jax.block_until_ready(latents)
    pictures = []
    with timed(seconds, "decode"):
        for i in range(0, len(requests), together):
            pictures += _decode(model, _rows(latents, i, together), canvases[i : i + together], options)
    shares = {stage: spent / len(requests) for stage, spent in seconds.items()}
    return [Restored(image=picture, seconds=shares, maps=maps) for picture in pictures]


def _seen_together(model: "FaithDiff", requests: Sequence[Request], count: int) -> int:
    """How many pictures of a batch of `count`, a power of two, encoders and decoder see at once: one a device.

    Pictures with captions for their tiles have several texts each, and go one by one.
    """
    if model.mesh is None or not all(isinstance(request.caption, str) for request in requests):
        return 1
    return min(count, 1 << (model.mesh.size.bit_length() - 1))


def _encode(model: "FaithDiff", pairs: Sequence[tuple[Request, Canvas]], options: RestoreOptions) -> SamplingInputs:
    """The arrays of pictures of one padded size."""
    padded = np.concatenate([canvas.padded() for _, canvas in pairs])
    each = [_noise(model, *pair, options) for pair in pairs]
    noise = each[0]
    if len(pairs) > 1:
        noise = {name: np.concatenate([one[name] for one in each], axis=-4) for name in each[0]}
    text, negative = _texts(model, [request.caption for request, _ in pairs], options.negative_caption)
    from_lq = options.start == "lr"
    return SamplingInputs(
        features=model.encode_lq(padded, vae_tile=options.vae_tile),
        text=text,
        negative=negative,
        noise=noise["start"],
        start=model.encode(padded, noise["encode"], vae_tile=options.vae_tile) if from_lq else None,
        step_noise=noise.get("steps"),
    )


def _texts(model: "FaithDiff", captions: Sequence[Caption], negative: str) -> tuple[Text, Text]:
    """Captions and negative captions of pictures, of which several have one caption each."""
    if len(captions) == 1:
        return encode_captions(model, captions[0], negative)
    context, pooled = model.encode_text([*map(str, captions), *[negative] * len(captions)])
    sides = slice(None, len(captions)), slice(len(captions), None)
    text, without = (Text.of(context[side], pooled[side]) for side in sides)
    return text, without


def _noise(model: "FaithDiff", request: Request, canvas: Canvas, options: RestoreOptions) -> Mapping[str, Any]:
    """Given or drawn, by what it is for; see `noise_shapes`."""
    shapes = inputs_.noise_shapes(options, model.config, canvas.size)
    if request.noise is not None:
        inputs_.check_noise(request.noise, options, shapes)
        return request.noise
    inside = canvas.exact_size[0] // model.config.vae.factor, canvas.exact_size[1] // model.config.vae.factor
    seed = options.seed if request.seed is None else request.seed
    return inputs_.drawn_noise(shapes, seed, model.programs.normal, inside)


def _rows(latents: Array, first: int, count: int) -> Array | np.ndarray:
    """Some pictures' latents; cut out on the host, where that takes no program."""
    return latents if latents.shape[0] == count else np.asarray(latents)[first : first + count]


def _decode(
    model: "FaithDiff", latents: Array | np.ndarray, canvases: Sequence[Canvas], options: RestoreOptions
) -> list[UInt8[np.ndarray, "H W 3"]]:
    """The pictures of latents (n, h, w, c), of which those without a canvas are surplus."""
    decoded = np.asarray(decode(model, latents, options))
    return [_finished(model, one, canvas, options) for one, canvas in zip(decoded, canvases, strict=False)]


def _finished(
    model: "FaithDiff", decoded: Float32[np.ndarray, "padded_H padded_W 3"], canvas: Canvas, options: RestoreOptions
) -> UInt8[np.ndarray, "H W 3"]:
    """What was decoded, without the padding and with the colours of the upscaled input."""
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
