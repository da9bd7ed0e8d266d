"""`restore --frames`: the pictures of a folder as frames of a video."""

import argparse
import itertools
import os
from collections.abc import Sequence

from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli.command import Parser
from faithdiff_jax.cli.jobs import Job
from faithdiff_jax.errors import InputError
from faithdiff_jax.files import images
from faithdiff_jax.files.listing import natural_order

RADIUS = 4


def add_flags(parser: Parser) -> None:
    """The flag."""
    parser.add_argument(
        "--frames",
        type=types.whole(0, 1000),
        nargs="?",
        const=RADIUS,
        metavar="N",
        help="the folder holds the frames of a video: in the order of their numbers, and with colours smoothed over N "
        f"frames on either side ({RADIUS} without N)",
    )


def check(arguments: argparse.Namespace) -> None:
    """InputError for what excludes frames; nothing is read."""
    if arguments.frames is None:
        return
    if arguments.attribute:
        raise InputError("--frames and --attribute: give one of them")
    if os.path.isfile(arguments.input):
        raise InputError(f"--frames: {arguments.input} is a file, a folder of frames is needed")


def ordered(jobs: Sequence[Job]) -> list[Job]:
    """By the numbers in their names.

    Raises:
        InputError: frames of different sizes.
    """
    jobs = sorted(jobs, key=lambda job: natural_order(job.source.name))
    sizes = {}
    for source in dict.fromkeys(job.source for job in jobs):
        try:
            sizes[source] = images.upright_size(source)
        except InputError:  # told when its turn comes
            continue
    for one, other in itertools.pairwise(sizes):
        if sizes[one] != sizes[other]:
            found = " and ".join(f"{path.name} {sizes[path][1]}x{sizes[path][0]}" for path in (one, other))
            raise InputError(f"--frames: {found} pixels, all frames must be of one size")
    return jobs
