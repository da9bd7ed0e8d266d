"""One record and one generator to one training sample: flip, crop, degradation, resize back up, caption, time numbers.

The offline recipe degrades a whole photograph, and crops the pair when it trains. Here a photograph is cropped first
and the crop alone is degraded, which is what makes degradation while training affordable. The difference: blurs and
resizes mirror the picture at the crop's border instead of seeing beyond it, JPEG's blocks start at the crop's corner,
and Poisson noise counts the levels of the crop. Pairs are cropped as published. Pictures are decoded whole: a JPEG file
cannot be entered in the middle, and its reduced scales would be another picture.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from faithdiff_jax.config import Range, check_ranges
from faithdiff_jax.data.checks import check_probability, is_whole
from faithdiff_jax.data.decode import decode
from faithdiff_jax.data.degradation.degrade import LEVELS, DegradationConfig, degrade
from faithdiff_jax.data.sources import PAIR_SCALE, Record, check_pair_size
from faithdiff_jax.errors import InputError, shown
from faithdiff_jax.files.captions import trim_caption

UPSCALING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
LARGEST_CROP = 8192


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How a sample is cut from a record.

    `crop` is the side in HQ pixels, a multiple of the degradation's scale and of 4, up to `LARGEST_CROP`. `flip`
    mirrors half of the pictures left to right; `caption_dropout` is the share of captions replaced by "". Of `crops`
    random crops of a photograph, the one with the largest gradients is taken; pairs are cropped once, as published.
    `levels` are the shares of photographs degraded at a named level (`degradation.presets.LEVELS`) instead of as
    `degradation` says. `upscaling` are the filters of which one, by lot, enlarges the LQ picture again: all three as
    published, though restoring uses bicubic alone.
    """

    crop: int = 512
    crops: int = 1
    flip: bool = True
    caption_dropout: float = 0.2
    degradation: DegradationConfig = DegradationConfig()
    levels: Mapping[str, float] = field(default_factory=dict)
    upscaling: tuple[str, ...] = tuple(UPSCALING)

    def __post_init__(self) -> None:
        if not is_whole(self.crop) or self.crop > LARGEST_CROP:
            raise InputError(f"crop is {shown(self.crop)}: must be a whole number up to {LARGEST_CROP}")
        for scale in (PAIR_SCALE, self.degradation.scale):
            if self.crop < scale or self.crop % scale:
                raise InputError(f"crop is {self.crop}: must be a positive multiple of the scale {scale}")
        check_probability(self, "caption_dropout")
        check_ranges(self, crops=Range(1, 64, whole=True))
        if not self.upscaling or any(name not in UPSCALING for name in self.upscaling):
            raise InputError(f"upscaling is {shown(self.upscaling)}: must be one or more of {', '.join(UPSCALING)}")
        unknown = [name for name in self.levels if name not in LEVELS]
        if unknown:
            raise InputError(f"levels has {shown(unknown[0])}: must be of {', '.join(LEVELS)}")
        total = sum(self.levels.values())
        if not all(0 <= share <= 1 for share in self.levels.values()) or not total <= 1 + 1e-9:
            raise InputError(f"levels are {shown(dict(self.levels))}: must be shares from 0 to 1, together at most 1")


class Sample(NamedTuple):
    """One sample: `hq` and `lq` (crop, crop, 3) uint8, the trimmed caption, and SDXL's six time numbers.

    The time numbers are float32, in HQ pixels: height and width of the picture before it was padded or cropped, top
    and left of the crop, and the crop twice.
    """

    hq: UInt8[np.ndarray, "crop crop 3"]
    lq: UInt8[np.ndarray, "crop crop 3"]
    caption: str
    time_ids: Float32[np.ndarray, " 6"]


def make_sample(
    record: Record, rng: np.random.Generator, config: SampleConfig, shorter_side: tuple[int, int] | None = None
) -> Sample:
    """Make a sample of a record: a pure function of its arguments and the generator's state.

    `shorter_side` is that of `SourceConfig`. A picture smaller than the crop is continued to the right and below by
    its mirror image (without repeating the border pixel), as published. Raises InputError, naming the record, for a
    picture that does not decode, or a pair that is not 1:4.

    Source: FaithDiff's `dataloader/Realesrgan_offline_dataset.py`. There the height of a picture that is smaller than
    the crop on one side only is the padded one.
    """
    hq, lq = _decode(record, rng)
    if shorter_side is not None:
        hq, lq = _resize_to_shorter_side(hq, lq, shorter_side, rng)
    height, width = hq.shape[:2]
    if config.flip and rng.random() < 0.5:
        hq, lq = hq[:, ::-1], None if lq is None else lq[:, ::-1]

    if lq is None:
        hq, top, left = _crop_photo(hq, config, rng)
        lq = degrade(hq, rng, _degradation(config, rng))
    else:
        hq, lq, top, left = _crop_pair(hq, lq, config.crop, rng)
    enlarge = UPSCALING[config.upscaling[rng.integers(len(config.upscaling))]]
    lq = np.asarray(Image.fromarray(lq).resize((config.crop, config.crop), enlarge))

    caption = "" if rng.random() < config.caption_dropout else trim_caption(record.caption)
    time_ids = np.array([height, width, top, left, config.crop, config.crop], np.float32)
    return Sample(hq, lq, caption, time_ids)


def _decode(record: Record, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode the HQ picture, and one of the LQ pictures if there are any."""
    hq = decode(record.hq, record.name)
    if not record.lq:
        return hq, None
    name = f"the LQ picture of {record.name}"
    lq = decode(record.lq[rng.integers(len(record.lq))], name)
    check_pair_size(hq.shape, lq.shape, name)
    return hq, lq


def _resize_to_shorter_side(
    hq: np.ndarray, lq: np.ndarray | None, limits: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Resize both pictures so that HQ's shorter side is a multiple of four drawn from `limits`, and all sides 1:4."""
    low, high = (limit // PAIR_SCALE for limit in limits)
    shorter = int(rng.integers(low, high, endpoint=True))
    scale = shorter / min(hq.shape[:2])
    height, width = (max(shorter, round(side * scale)) for side in hq.shape[:2])
    hq = _bicubic(hq, height * PAIR_SCALE, width * PAIR_SCALE)
    return hq, None if lq is None else _bicubic(lq, height, width)


def _bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _degradation(config: SampleConfig, rng: np.random.Generator) -> DegradationConfig:
    if not config.levels:
        return config.degradation
    drawn = rng.random()
    for name, share in config.levels.items():
        if drawn < share:
            return LEVELS[name]
        drawn -= share
    # What rounding leaves of shares that make up one belongs to the last.
    return config.degradation if sum(config.levels.values()) < 1 - 1e-9 else LEVELS[name]


def _crop_photo(image: np.ndarray, config: SampleConfig, rng: np.random.Generator) -> tuple[np.ndarray, int, int]:
    size = config.crop
    image = _pad(image, size)
    corners = [_corner(image.shape, size, rng) for _ in range(config.crops)]
    cuts = [(_cut(image, top, left, size), top, left) for top, left in corners]
    return cuts[0] if len(cuts) == 1 else max(cuts, key=lambda cut: _gradient(cut[0]))


def _gradient(image: np.ndarray) -> float:
    """Mean absolute difference of neighbours, of the green channel."""
    green = image[..., 1].astype(np.int16)
    return float(np.abs(np.diff(green, axis=0)).mean() + np.abs(np.diff(green, axis=1)).mean())


def _crop_pair(
    hq: np.ndarray, lq: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Crop both pictures at the same place, which lies on an LQ pixel's corner; top and left are in HQ pixels."""
    small = size // PAIR_SCALE
    hq, lq = _pad(hq, size), _pad(lq, small)
    top, left = _corner(lq.shape, small, rng)
    lq = _cut(lq, top, left, small)
    top, left = top * PAIR_SCALE, left * PAIR_SCALE
    return _cut(hq, top, left, size), lq, top, left


def _pad(image: np.ndarray, size: int) -> np.ndarray:
    below, right = (max(0, size - side) for side in image.shape[:2])
    if not below and not right:
        return image
    return cv2.copyMakeBorder(np.ascontiguousarray(image), 0, below, 0, right, cv2.BORDER_REFLECT_101)


def _corner(shape: tuple[int, ...], size: int, rng: np.random.Generator) -> tuple[int, int]:
    top = rng.integers(shape[0] - size, endpoint=True)
    return int(top), int(rng.integers(shape[1] - size, endpoint=True))


def _cut(image: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    piece = image[top : top + size, left : left + size]
    # NumPy copies a mirrored view pixel by pixel; OpenCV mirrors the plain one ten times as fast.
    return cv2.flip(piece[:, ::-1], 1) if piece.strides[1] < 0 else np.ascontiguousarray(piece)
