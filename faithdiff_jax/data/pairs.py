"""Command that degrades a folder of photographs once, into a fixed paired set: `HR/`, `LR/` and `Caption/`.

python -m faithdiff_jax.data.pairs --input photographs --output pairs --level II --seed 0
"""

import argparse
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from faithdiff_jax.cli.command import SOME_FILES_BAD, Parser, run
from faithdiff_jax.data.degradation.degrade import LEVELS, PUBLISHED, DegradationConfig, degrade
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.captions import find_caption, read_caption, write_caption
from faithdiff_jax.files.images import list_images, load_image, save_image


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
    _refuse_equal_names(images)
    try:
        for name in ("HR", "LR", "Caption"):
            (output / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output}: cannot make the folders of the pairs ({error.strerror})") from error
    faults = []
    for path in tqdm(images, unit="image", disable=None):
        if (output / "LR" / f"{path.stem}.png").exists():
            continue
        try:
            _make_pair(path, output, config, seed, crop, captions)
        except InputError as error:
            faults.append(str(error))
    return faults


def image_generator(seed: int, name: str) -> np.random.Generator:
    """Make an image's own generator from the seed and its file name, so that other images do not change it."""
    return np.random.default_rng((seed, zlib.crc32(name.encode())))


def crop_middle(image: np.ndarray, scale: int, crop: int | None) -> np.ndarray:
    """Cut the middle `crop` x `crop` of (H, W, 3), or without `crop` the most whose sides are multiples of `scale`.

    Raises InputError if the image is smaller than that.
    """
    height, width = image.shape[:2]
    wanted_height, wanted_width = (crop, crop) if crop else (height - height % scale, width - width % scale)
    if min(height, width) < (crop or scale):
        raise InputError(f"{width}x{height} pixels, each side must have at least {crop or scale}")
    top, left = (height - wanted_height) // 2, (width - wanted_width) // 2
    return np.ascontiguousarray(image[top : top + wanted_height, left : left + wanted_width])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0 if every image was used, 1 if some were not, 2 for a fault that stops everything."""
    parser = Parser("Degrade a folder of photographs into a fixed paired set.")
    parser.add_argument("--input", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--output", type=Path, required=True, help="folder for HR/, LR/ and Caption/")
    parser.add_argument("--level", choices=[*LEVELS, "published"], required=True, help="severity of the degradation")
    parser.add_argument("--seed", type=_seed, default=0, help="of the random numbers")
    parser.add_argument("--crop", type=int, help="side of the middle square to keep; without it all is kept")
    parser.add_argument("--captions", type=Path, help="folder of captions (.json, .txt); without it beside the images")
    options = parser.parse_args(arguments)
    return run(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    config = {**LEVELS, "published": PUBLISHED}[options.level]
    if options.crop is not None and (options.crop < config.scale or options.crop % config.scale):
        raise InputError(f"--crop {options.crop}: must be a positive multiple of {config.scale}")
    if options.captions is not None and not options.captions.is_dir():
        raise InputError(f"--captions {options.captions}: not a folder")
    images = list_images(options.input)
    if not images:
        raise InputError(f"{options.input}: holds no images")
    cv2.setNumThreads(0)
    faults = make_pairs(images, options.output, config, seed=options.seed, crop=options.crop, captions=options.captions)
    if faults:
        print(f"{len(faults)} of {len(images)} images could not be used:", file=sys.stderr)
        print("\n".join(faults), file=sys.stderr)
    return SOME_FILES_BAD if faults else 0


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative, a seed is 0 or more")
    return value


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


if __name__ == "__main__":
    sys.exit(main())
