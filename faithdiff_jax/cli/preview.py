"""`faithdiff preview`: a contact sheet of degraded photographs, to see what a degradation does."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2

from faithdiff_jax.cli.command import SOME_FILES_BAD, Parser, run
from faithdiff_jax.data.degradation.degrade import LEVELS, PUBLISHED
from faithdiff_jax.data.preview import draw_sheet, read_config, sample_pairs
from faithdiff_jax.data.sources import PhotoFolder
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.images import output_format, save_image

MAX_COUNT = 500


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0, 1 if photographs could not be used, 2 for bad input."""
    options = _parser().parse_args(argv)
    return run(lambda: _preview(options))


def _parser() -> Parser:
    parser = Parser("Draw a contact sheet of degraded photographs with their settings and captions.")
    parser.add_argument("--input", type=Path, metavar="DIR", required=True, help="folder of photographs, at any depth")
    parser.add_argument("--output", type=Path, metavar="FILE", required=True, help="the sheet, a .png")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--level", choices=["published", *LEVELS], default="published", help="degradation by its name")
    which.add_argument(
        "--config", type=Path, metavar="YAML", help="degradation from a file: its keys, or those under `degradation`"
    )
    parser.add_argument("--count", type=int, metavar="N", default=12, help=f"of pairs, up to {MAX_COUNT}")
    parser.add_argument("--crop", type=int, metavar="PIXELS", default=256, help="side of the middle square to show")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    parser.add_argument("--captions", type=Path, metavar="DIR", help="captions, if they are not beside the photographs")
    return parser


def _preview(options: argparse.Namespace) -> int:
    config = (
        {**LEVELS, "published": PUBLISHED}[options.level] if options.config is None else read_config(options.config)
    )
    if not 1 <= options.count <= MAX_COUNT:
        raise InputError(f"--count {options.count}: must be from 1 to {MAX_COUNT}")
    if options.crop < config.scale or options.crop % config.scale:
        raise InputError(f"--crop {options.crop}: must be a positive multiple of {config.scale}")
    if options.seed < 0:
        raise InputError(f"--seed {options.seed}: must be 0 or more")
    output_format(options.output)
    source = PhotoFolder(options.input, options.captions)
    cv2.setNumThreads(0)
    pairs, faults = sample_pairs(source, config, count=options.count, crop=options.crop, seed=options.seed)
    heading = (
        f"degradation {options.config or options.level}, seed {options.seed}, crop {options.crop}; {source.summary}"
    )
    save_image(options.output, draw_sheet(pairs, heading))
    if faults:
        print(f"{len(faults)} photographs could not be used:", file=sys.stderr)
        print("\n".join(faults), file=sys.stderr)
    return SOME_FILES_BAD if faults else 0
