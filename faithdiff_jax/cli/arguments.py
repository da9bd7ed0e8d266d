"""Types of arguments that commands share: each refuses what is wrong in a line that says what would be right.

They are given to `add_argument(type=...)`, so that a wrong flag ends the command before anything is imported or read.
"""

import argparse
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from faithdiff_jax.errors import InputError
from faithdiff_jax.files import places
from faithdiff_jax.files.places import is_remote
from faithdiff_jax.inference import about

Value = TypeVar("Value")

DTYPES = ("auto", "float32", "bfloat16")
"""Of a model; auto is the platform's."""
EIGHT_BITS = ("int8", "fp8")
"""`models.quantization.FORMATS`, which takes JAX to import."""
LARGEST_SEED = 2**32 - 1
LARGEST_SIDE = 16384
"""Of a picture that is named by its size."""


def _reader(read: Callable[[str], Value]) -> Callable[[str], Value]:
    """What reads text, as a type of argument."""

    def parse(text: str) -> Value:
        try:
            return read(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


integer, number, wholes = _reader(about.whole_number), _reader(about.number), _reader(about.whole_numbers)
"""A whole number, a number, or whole numbers with commas between; for what has its range elsewhere."""
READERS = {kind: _reader(read) for kind, read in about.READERS.items()}
"""Kind of an option -> its type of argument."""


def whole(least: int, most: int | None = None, step: int = 1) -> Callable[[str], int]:
    """A whole number from `least` to `most`, a multiple of `step`."""
    multiple = "" if step == 1 else f", a multiple of {step}"
    limits = f"from {least} to {most}" if most is not None else f"{least} or more"

    def parse(text: str) -> int:
        try:
            value = about.whole_number(text)
        except InputError:
            value = None
        if value is None or value < least or (most is not None and value > most) or value % step:
            raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, {limits}{multiple}")
        return value

    return parse


seed = whole(0, LARGEST_SEED)
"""The seed of random numbers."""


def nonempty(text: str) -> str:
    """Text as it is, but not none at all: of a path, that would mean the folder that the command was called in."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: must not be empty")
    return text


def path(text: str) -> Path:
    """A path of this machine."""
    nonempty(text)
    if is_remote(text):
        raise argparse.ArgumentTypeError(f"{text}: only a path of this machine can be given here")
    return Path(text)


place = _reader(lambda text: places.place(nonempty(text)))
"""A path of this machine, or of an object store."""


def folder(text: str) -> Path:
    """A folder that exists."""
    found = path(text)
    if not os.path.isdir(found):
        raise argparse.ArgumentTypeError(
            f"{text}: is a file, a folder is needed" if os.path.exists(found) else f"{text}: no such folder"
        )
    return found


def named_folder(text: str) -> tuple[str, Path]:
    """NAME=DIR, a method and the folder of its pictures; that it is there is seen when it is read."""
    name, equals, place = text.partition("=")
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: must be NAME=DIR, such as ours=restored")
    return name.strip(), path(place)


def weighted_file(text: str) -> tuple[str, float]:
    """FILE, or FILE=WEIGHT; what is behind the last = and no number belongs to the file's name."""
    name, equals, weight = text.rpartition("=")
    try:
        number = float(weight)
    except ValueError:
        name, equals, number = text, "", 1.0
    if not equals:
        name, number = text, 1.0
    if not name or not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r}: must be FILE or FILE=WEIGHT, such as style.safetensors=0.8")
    return str(path(name)), number


def add_methods(parser: argparse.ArgumentParser, help: str) -> None:
    """The flags of commands that compare folders; `by_name` reads what --method was given."""
    parser.add_argument("--method", type=named_folder, metavar="NAME=DIR", action="append", required=True, help=help)
    add_ending(parser)


def add_ending(parser: argparse._ActionsContainer) -> None:
    """The flag for restored pictures whose names leave in doubt which picture they belong to."""
    parser.add_argument(
        "--ending", type=nonempty, metavar="TEXT", help="what restored names have behind the picture's, if in doubt"
    )


def by_name(pairs: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    """What a flag of `named_folder` was given, each name once.

    Raises:
        InputError: a name occurs twice.
    """
    folders: dict[str, Path] = {}
    for name, place in pairs:
        if name in folders:
            raise InputError(f"--method {name}: is given twice, choose another name")
        folders[name] = place
    return folders


def output_folder(text: str) -> Path:
    """A folder to write to, there already or not."""
    found = path(text)
    if os.path.exists(found) and not os.path.isdir(found):
        raise argparse.ArgumentTypeError(f"{text}: is a file, name a folder")
    return found


def output_place(text: str) -> Path:
    """A folder to write to, of this machine or of an object store."""
    return place(text) if is_remote(text) else output_folder(text)


def mesh(text: str) -> tuple[int, int]:
    """DATAxFSDP, the sides of a mesh of devices."""
    sides = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if not sides or not all(int(side) for side in sides.groups()):
        raise argparse.ArgumentTypeError(f"{text!r}: must be DATAxFSDP, such as 4x2")
    return int(sides[1]), int(sides[2])


def address(text: str) -> str:
    """HOST:PORT of a process."""
    host, _, port = text.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: must be HOST:PORT, such as 10.0.0.1:1234")
    return text


def check_process_id(process_id: int, processes: int) -> None:
    """Refuse the number of a process that is not one of so many.

    Raises:
        InputError: it is not below their number.
    """
    if process_id >= processes:
        raise InputError(f"--process-id {process_id}: must be below --processes, {processes}")


def pixels(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT of a picture."""
    sides = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if not sides or not all(1 <= int(side) <= LARGEST_SIDE for side in sides.groups()):
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be WIDTHxHEIGHT in pixels, up to {LARGEST_SIDE}, as 1024x1024"
        )
    return int(sides[1]), int(sides[2])
