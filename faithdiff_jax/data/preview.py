"""A contact sheet of HQ/LQ pairs with what was drawn for each: what a degradation does, before training with it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from faithdiff_jax.data.decode import decode
from faithdiff_jax.data.degradation.degrade import (
    Blur,
    DegradationConfig,
    DegradationParameters,
    Noise,
    Resize,
    Sinc,
    apply,
    draw,
    stages,
)
from faithdiff_jax.data.pairs import crop_middle
from faithdiff_jax.data.samples import UPSCALING
from faithdiff_jax.data.sources import PhotoFolder
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.captions import trim_caption
from faithdiff_jax.files.sheets import PAPER, side_by_side, stacked, titled, wrapped, written

SHEET_WIDTH = 1700  # pixels that a row of pairs may take, if more than one is in it
MARGIN = 24
MAX_SHEET_PIXELS = 2**26
SMALLEST_SIDE = 224  # of a picture on the sheet, so that text fits under it
MAX_CAPTION_LINES = 3
FAINT, BLUE = (110, 108, 102), (26, 74, 128)
LEGEND = (
    "blur: kernel size, s sigma, b exponent, w sinc cut-off (radians)",
    "resize: x/4 is relative to the LQ size",
    "noise: gaussian sigma of 255, poisson scale",
)


class Pair(NamedTuple):
    """One cell of the sheet: both pictures (crop, crop, 3) uint8, and the lines around them.

    `title` is the photograph's name, `lq_label` the LQ picture's size and how it was enlarged, `settings` what
    `describe` says, `caption` the caption as training has it.
    """

    hq: np.ndarray
    lq: np.ndarray
    title: str
    lq_label: str
    settings: list[str]
    caption: str


def describe(parameters: DegradationParameters) -> list[str]:
    """Say what was drawn: a line for each round of the degradation and one for its end, stages in their order.

    A stage that did not happen is left out, and so are a resize to the size there was, and a line without stages.
    Blur: family, kernel size, s = sigma in pixels (an anisotropic kernel has two, and an angle in degrees), b =
    exponent; or a sinc, w = cut-off in radians. Resize: the factor as drawn, of the photograph or ("/4") of its LQ
    size, mode, width x height. Noise: sigma in levels of 255 or Poisson scale, "gray" if the channels share it.
    """
    lines: dict[str, list[str]] = {"1st": [], "2nd": [], "end": []}
    size = parameters.shape
    for name, _ in stages(parameters):
        drawn = getattr(parameters, name)
        if isinstance(drawn, Resize):
            before, size = size, (drawn.height, drawn.width)
            if size == before:
                continue
        part = "1st" if name.endswith("1") else "2nd" if name in ("blur2", "resize2", "noise2") else "end"
        lines[part].append(_describe_stage(name, drawn, parameters))
    return [f"{part}: {' | '.join(texts)}" for part, texts in lines.items() if texts]


def sample_pairs(
    source: PhotoFolder, config: DegradationConfig, *, count: int, crop: int, seed: int
) -> tuple[list[Pair], list[str]]:
    """Degrade `count` photographs, drawn without regard to their order, and give the pairs and the bad files met.

    With fewer photographs than `count`, they come again with other draws. The middle `crop` x `crop` is taken; a
    smaller photograph is continued by its mirror image, as in training. What a pair looks like depends on the seed, its
    place and the photograph only.

    Raises:
        InputError: no photograph can be used, or the sheet would have more than `MAX_SHEET_PIXELS`.
    """
    if crop < config.scale or crop % config.scale:
        raise InputError(f"crop {crop}: must be a positive multiple of {config.scale}")
    pixels = count * 2 * max(crop, SMALLEST_SIDE) ** 2
    if pixels > MAX_SHEET_PIXELS:
        raise InputError(
            f"crop {crop} with count {count}: makes a sheet of {pixels / 1e6:,.0f} million pixels, "
            f"at most {MAX_SHEET_PIXELS / 1e6:,.0f} million are drawn"
        )
    photographs: list[tuple[str, np.ndarray, str]] = []
    faults = []
    for index in np.random.default_rng(seed).permutation(len(source)):
        if len(photographs) == count:
            break
        try:
            record = source[index]
            image = crop_middle(_mirror_to(decode(record.hq, record.name), crop), config.scale, crop)
        except InputError as error:
            faults.append(str(error))
        else:
            name = str(Path(record.name).relative_to(source.folder))
            photographs.append((name, image, trim_caption(record.caption)))
    if not photographs:
        raise InputError(f"{source.folder}: none of {len(faults)} photographs can be used; the first: {faults[0]}")
    pairs = []
    for place in range(count):
        name, image, caption = photographs[place % len(photographs)]
        rng = np.random.default_rng((seed, place))
        parameters = draw(rng, image.shape, config)
        lq = apply(image, parameters)
        enlarge = list(UPSCALING.values())[rng.integers(len(UPSCALING))]
        enlarged = np.asarray(Image.fromarray(lq).resize((crop, crop), enlarge))
        label = f"LQ {lq.shape[1]}x{lq.shape[0]}, enlarged {enlarge.name.lower()}"
        pairs.append(Pair(image, enlarged, name, label, describe(parameters), caption))
    return pairs, faults


def draw_sheet(pairs: Sequence[Pair], heading: str) -> np.ndarray:
    """Draw the pairs in rows under a heading: (H, W, 3) uint8. All have the same crop; a small one is magnified."""
    cells = [_cell(pair) for pair in pairs]
    step = cells[0].shape[1] + MARGIN
    columns = max(1, min(len(pairs), (SHEET_WIDTH + MARGIN) // step))
    width = columns * step - MARGIN
    head = [*wrapped(heading.split(), " ", width), *wrapped(LEGEND, "   |   ", width)]
    rows = [side_by_side(cells[start : start + columns], MARGIN) for start in range(0, len(cells), columns)]
    sheet = stacked([written(head, width), *rows], MARGIN)
    return np.pad(sheet, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=PAPER)


def read_config(path: Path) -> DegradationConfig:
    """Read a degradation: a YAML file of its keys, or one that has them under `degradation`, there or in `data`.

    So a training stage's file can be shown; one that says nothing about it gets the published degradation. Raises
    InputError as `config.load_yaml` and `config.from_dict` do.
    """
    # Late, as the configuration of a whole model brings JAX with it.
    from faithdiff_jax.config import from_dict, load_yaml

    content = load_yaml(path)
    keys = content
    for name, default in (("data", content), ("degradation", content if "data" not in content else {})):
        keys = keys.get(name, default)
        if not isinstance(keys, dict):
            raise InputError(f"{path}: {name} is {keys!r}, a mapping of keys to values is needed")
    return from_dict(DegradationConfig, keys, str(path))


def _describe_stage(name: str, drawn: Blur | Sinc | Resize | Noise | int, parameters: DegradationParameters) -> str:
    match drawn:
        case Sinc():
            text = f"sinc {drawn.size} w={drawn.omega:.2f}"
            return text if name == "final_sinc" else f"blur {text}"
        case Blur():
            return _describe_blur(drawn)
        case Resize():
            scale = parameters.shape[0] // parameters.final_resize.height
            factor = {"resize1": f"{drawn.factor:.2f}", "resize2": f"{drawn.factor:.2f}/{scale}"}.get(
                name, f"1/{scale}"
            )
            return f"resize {factor} {drawn.mode} to {drawn.width}x{drawn.height}"
        case Noise():
            return f"noise {drawn.kind} {drawn.strength:.2f}{' gray' if drawn.gray else ''}"
        case _:
            return f"jpeg {drawn}"


def _describe_blur(blur: Blur) -> str:
    text = f"blur {blur.family.replace('_', ' ')} {blur.size} s={blur.sigma_x:.2f}"
    if blur.family.endswith("aniso"):
        text += f"x{blur.sigma_y:.2f} at {math.degrees(blur.theta):.0f} deg"
    return text if blur.beta is None else f"{text} b={blur.beta:.2f}"


def _mirror_to(image: np.ndarray, side: int) -> np.ndarray:
    """Continue (H, W, 3) to the right and below by its mirror image until each side has at least `side` pixels."""
    below, right = (max(0, side - length) for length in image.shape[:2])
    return np.pad(image, ((0, below), (0, right), (0, 0)), mode="reflect") if below or right else image


def _cell(pair: Pair) -> np.ndarray:
    """Both pictures of a pair with the lines around them."""
    zoom = math.ceil(SMALLEST_SIDE / len(pair.hq))
    large = [image.repeat(zoom, axis=0).repeat(zoom, axis=1) for image in (pair.hq, pair.lq)]
    pictures = side_by_side([titled("HQ", large[0]), titled(pair.lq_label, large[1])])
    width = pictures.shape[1]
    settings = [line for text in pair.settings for line in wrapped(text.split(" | "), " | ", width, "       ")]
    caption = wrapped(pair.caption.split(), " ", width)
    last = MAX_CAPTION_LINES - 1
    if len(caption) > MAX_CAPTION_LINES:
        caption[last:] = [" ".join(caption[last : last + 2])]  # too long by now, so that it ends in dots
    below = written(caption, width, BLUE) if caption else written(["no caption"], width, FAINT)
    return stacked([written([pair.title], width), pictures, written(settings, width), below], 0)
