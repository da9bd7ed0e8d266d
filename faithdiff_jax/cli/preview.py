"""`faithdiff preview`: a contact sheet of degraded photographs, to see what a degradation does."""

import argparse

import cv2

from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli.command import Parser, report_faults
from faithdiff_jax.config import find_config
from faithdiff_jax.data.degradation.degrade import LEVELS, PUBLISHED
from faithdiff_jax.data.preview import draw_sheet, read_config, sample_pairs
from faithdiff_jax.data.sources import PhotoFolder
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.images import output_format, save_image

DESCRIPTION = """Degrade some photographs and draw them on one sheet, before and after, with the settings that were
drawn and the captions: look at it before training with a degradation."""
MOST_PAIRS = 500
LARGEST_CROP = 4096


def build_parser() -> Parser:
    """Describe the flags."""
    parser = Parser(DESCRIPTION)
    add = parser.add_argument
    add("--input", type=types.folder, metavar="DIR", required=True, help="folder of photographs, at any depth")
    add("--output", type=types.path, metavar="FILE", required=True, help="picture to write the sheet to, a .png")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--level",
        choices=["published", *LEVELS],
        default="published",
        help="a degradation by its name: I is the mildest, published is the one FaithDiff was trained with",
    )
    which.add_argument(
        "--config",
        metavar="NAME_OR_YAML",
        help="a degradation from a configuration: that of a training stage, such as tiny/base, or a file of its own",
    )
    add("--count", type=types.whole(1, MOST_PAIRS), metavar="N", default=12, help="pairs on the sheet")
    add(
        "--crop",
        type=types.whole(1, LARGEST_CROP),
        metavar="PIXELS",
        default=256,
        help="side of the square shown of each photograph, a multiple of 4",
    )
    add("--seed", type=types.seed, default=0, metavar="N", help="of the random numbers; the same seed, the same sheet")
    add(
        "--captions",
        type=types.folder,
        metavar="DIR",
        help="folder with a .json or .txt file for each photograph (default: beside the photographs)",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Draw and write the sheet; photographs that cannot be used are listed at the end."""
    if arguments.config is None:
        config = {**LEVELS, "published": PUBLISHED}[arguments.level]
    else:
        config = read_config(find_config(arguments.config))
    if arguments.crop % config.scale:
        raise InputError(f"--crop {arguments.crop}: must be a multiple of {config.scale}")
    output_format(arguments.output)
    source = PhotoFolder(arguments.input, arguments.captions)
    cv2.setNumThreads(0)
    pairs, faults = sample_pairs(source, config, count=arguments.count, crop=arguments.crop, seed=arguments.seed)
    name = arguments.config or arguments.level
    heading = f"degradation {name}, seed {arguments.seed}, crop {arguments.crop}; {source.summary}"
    save_image(arguments.output, draw_sheet(pairs, heading))
    return report_faults(faults, len(source), "photographs could not be used")
