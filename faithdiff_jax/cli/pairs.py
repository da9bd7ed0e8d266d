"""`faithdiff pairs`: degrade a folder of photographs once, into a fixed set of training pairs."""

import argparse

import cv2

from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli.command import Parser, report_faults
from faithdiff_jax.data.degradation.degrade import LEVELS, PUBLISHED
from faithdiff_jax.data.pairs import make_pairs
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.listing import list_images

DESCRIPTION = """Degrade every photograph of a folder once, and write a fixed set of pairs: HR/NAME.png is the
photograph, LR/NAME.png its degraded version at a quarter of the size, Caption/NAME.json its caption, if there is one.
Pairs that exist already are left alone, so the same command completes a set that was interrupted."""


def build_parser() -> Parser:
    """Describe the flags."""
    parser = Parser(DESCRIPTION)
    add = parser.add_argument
    add("--input", type=types.folder, metavar="DIR", required=True, help="folder of photographs")
    add("--output", type=types.output_folder, metavar="DIR", required=True, help="folder to write the pairs to")
    add(
        "--level",
        choices=[*LEVELS, "published"],
        required=True,
        help="how strong the degradation is: I is the mildest, published is the one FaithDiff was trained with",
    )
    add("--seed", type=types.seed, default=0, metavar="N", help="of the random numbers; the same seed, the same pairs")
    add(
        "--crop",
        type=types.whole(1),
        metavar="PIXELS",
        help="keep a square of this side from the middle of each photograph, a multiple of 4 (default: all of it)",
    )
    add(
        "--captions",
        type=types.folder,
        metavar="DIR",
        help="folder with a .json or .txt file for each photograph (default: beside the photographs)",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Write the pairs that are missing; photographs that cannot be used are listed at the end."""
    config = {**LEVELS, "published": PUBLISHED}[arguments.level]
    if arguments.crop is not None and arguments.crop % config.scale:
        raise InputError(f"--crop {arguments.crop}: must be a multiple of {config.scale}")
    images = list_images(arguments.input)
    if not images:
        raise InputError(f"{arguments.input}: holds no pictures")
    cv2.setNumThreads(0)
    faults = make_pairs(
        images, arguments.output, config, seed=arguments.seed, crop=arguments.crop, captions=arguments.captions
    )
    return report_faults(faults, len(images), "photographs could not be used")
