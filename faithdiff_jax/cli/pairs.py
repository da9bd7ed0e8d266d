"""`faithdiff pairs`: degrade a folder of photographs once, into a fixed paired set."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2

from faithdiff_jax.cli.command import SOME_FILES_BAD, Parser, run
from faithdiff_jax.data.degradation.degrade import LEVELS, PUBLISHED
from faithdiff_jax.data.pairs import make_pairs
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.listing import list_images


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 if every image was used, 1 if some were not, 2 for a fault that stops everything."""
    options = _parser().parse_args(argv)
    return run(lambda: _pairs(options))


def _parser() -> Parser:
    parser = Parser("Degrade a folder of photographs into a fixed paired set.")
    parser.add_argument("--input", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--output", type=Path, required=True, help="folder for HR/, LR/ and Caption/")
    parser.add_argument("--level", choices=[*LEVELS, "published"], required=True, help="severity of the degradation")
    parser.add_argument("--seed", type=_seed, default=0, help="of the random numbers")
    parser.add_argument("--crop", type=int, help="side of the middle square to keep; without it all is kept")
    parser.add_argument("--captions", type=Path, help="folder of captions (.json, .txt); without it beside the images")
    return parser


def _pairs(options: argparse.Namespace) -> int:
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
