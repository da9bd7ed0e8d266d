"""Photographs degraded once, into a fixed paired set: `HR/`, `LR/` and `Caption/`."""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from faithdiff_jax.data.degradation.degrade import DegradationConfig, degrade
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.captions import find_caption, read_caption, write_caption
from faithdiff_jax.files.images import load_image, save_image


def make_pairs(
    images: Sequence[Path],
    output: Path,
    config: DegradationConfig,
    *,
    seed: int,
    crop: int | None = None,
    captions: Path | None = None,
) -> list[str]:
    """Write `HR/NAME.png`, `LR/NAME.png` and, where a caption is found, `Caption/NAME.json` for each image.

    HR is the image's middle, `crop` on a side if given, else the most whose sides are multiples of the scale. The
    random numbers of an image depend on `seed` and its file name only. Captions are looked for in `captions`, or
    beside the image. A pair that is there already is left alone; LR is written last, so that it says the pair is
    complete. Returns one line for each image that could not be used; raises InputError if the folders cannot be made.
    """
    if crop is not None and (crop < config.scale or crop % config.scale):
        raise InputError(f"crop {crop}: must be a positive multiple of {config.scale}")
    _refuse_equal_names(images)
    try:
        for name in ("HR", "LR", "Caption"):
            (output / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output}: cannot make the folders of the pairs ({error.strerror})") from error
    faults = []
    for path in tqdm(images, unit="image", disable=None):
        if os.path.exists(output / "LR" / f"{path.stem}.png"):
            continue
        try:
            _make_pair(path, output, config, seed, crop, captions)
        except InputError as error:
            faults.append(str(error))
    return faults


def image_generator(seed: int, name: str) -> np.random.Generator:
    """Make an image's own generator from the seed and its file name, so that other images do not change it."""
    return np.random.default_rng((seed, zlib.crc32(os.fsencode(name))))


def crop_middle(image: UInt8[np.ndarray, "h w 3"], scale: int, crop: int | None) -> UInt8[np.ndarray, "H W 3"]:
    """Cut the middle `crop` x `crop` of (H, W, 3), or without `crop` the most whose sides are multiples of `scale`.

    Raises InputError if the image is smaller than that.
    """
    height, width = image.shape[:2]
    wanted_height, wanted_width = (crop, crop) if crop else (height - height % scale, width - width % scale)
    if min(height, width) < (crop or scale):
        raise InputError(f"{width}x{height} pixels, each side must have at least {crop or scale}")
    top, left = (height - wanted_height) // 2, (width - wanted_width) // 2
    return np.ascontiguousarray(image[top : top + wanted_height, left : left + wanted_width])


def _refuse_equal_names(images: Sequence[Path]) -> None:
    first: dict[str, Path] = {}
    for path in images:
        # Without regard to case, as some file systems compare names.
        other = first.setdefault(path.stem.casefold(), path)
        if other != path:
            raise InputError(f"{other} and {path}: would be written to the same files, rename one")


def _make_pair(
    path: Path, output: Path, config: DegradationConfig, seed: int, crop: int | None, captions: Path | None
) -> None:
    picture = load_image(path)
    try:
        high = crop_middle(picture.rgb, config.scale, crop)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    caption_file = find_caption(path, captions or path.parent)
    if caption_file is not None:
        write_caption(output / "Caption" / f"{path.stem}.json", read_caption(caption_file))
    low = degrade(high, image_generator(seed, path.name), config)
    save_image(output / "HR" / f"{path.stem}.png", high)
    save_image(output / "LR" / f"{path.stem}.png", low)
