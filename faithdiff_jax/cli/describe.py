"""Captions of `restore`: from files, or of a vision-language model that describes pictures before they are restored.

The two models are not in memory at the same time.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli.command import Parser
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.captions import (
    OF_TILES,
    Box,
    Caption,
    find_caption,
    read_caption,
    read_tile_captions,
    trim_caption,
)

INPUT, CLEANED = "input", "cleaned"

Captions = dict[Path, Caption | InputError]
"""Picture -> its caption, or those of its tiles, or why it has none."""
Boxes = Callable[[tuple[int, int]], Sequence[Box]]
"""Height and width of a picture -> what each of its tiles shows."""


def add_flags(parser: Parser) -> None:
    """The flags of describing pictures."""
    add = parser.add_argument
    add(
        "--caption-from",
        choices=(INPUT, CLEANED),
        help="have each picture described first: as it is, or as --clean makes it, as published with BSRNet",
    )
    add(
        "--captioner",
        metavar="DIR_OR_REPO",
        type=types.nonempty,
        help="what describes pictures: any image-text-to-text model (default: faithdiff caption's)",
    )
    add(
        "--clean",
        type=types.path,
        metavar="MODEL_DIR",
        help="for --caption-from cleaned: an RRDBNet, from faithdiff convert --rrdbnet",
    )
    add(
        "--tile-captions",
        action="store_true",
        help="a caption for each tile: made from what it shows of the picture, or of the caption file's tile_captions",
    )


def check(arguments: argparse.Namespace) -> None:
    """InputError for flags that lack or exclude one another; nothing is read. A captioner describes the input."""
    if arguments.caption_from is None and arguments.captioner is not None:
        arguments.caption_from = INPUT
    source = arguments.caption_from
    if source is not None and (arguments.caption or arguments.captions is not None):
        raise InputError("--caption-from and --captioner: captions are made, give neither --caption nor --captions")
    if source != CLEANED and arguments.clean is not None:
        raise InputError(f"--clean: is for --caption-from {CLEANED}")
    if source == CLEANED and arguments.clean is None:
        raise InputError(f"--caption-from {CLEANED}: needs --clean MODEL_DIR")
    if arguments.tile_captions and source is None and arguments.captions is None:
        raise InputError("--tile-captions: needs --captioner, --caption-from or --captions")
    if arguments.tile_captions and arguments.attribute:
        raise InputError("--attribute: is for words of one caption, leave out --tile-captions")


def captions_for(pictures: Sequence[Path], arguments: argparse.Namespace, boxes: Boxes) -> Captions:
    """Describe pictures as the flags say, trimmed as in training unless --keep-captions; none without --caption-from.

    Raises:
        InputError: a model that cannot be loaded, or no PyTorch.
    """
    if arguments.caption_from is None:
        return {}
    from faithdiff_jax.cli.caption import load_cleaner, prepare_library
    from faithdiff_jax.data.captioning import MODEL, Captioner, describe, describe_parts

    clean = None if arguments.clean is None else load_cleaner(arguments.clean)
    prepare_library()
    captioner = Captioner.load(arguments.captioner or MODEL)
    found: Captions = (
        dict(describe_parts(captioner, pictures, boxes, clean))
        if arguments.tile_captions
        else dict(describe(captioner, pictures, clean=clean))
    )
    return {path: made if isinstance(made, InputError) else _kept(made, arguments) for path, made in found.items()}


def caption_of(picture: Path, made: Caption | None, arguments: argparse.Namespace, notes: list[str]) -> Caption:
    """A picture's caption: the one that was made, that of its file, or that of all; `notes` says what is to be known.

    Raises:
        InputError: a file that cannot be used.
    """
    if made is not None:
        notes.append(f"described as {made!r}")
        return made
    if arguments.captions is None:
        return str(arguments.caption)
    file = find_caption(picture, arguments.captions)
    if file is None:
        notes.append("no caption found, restored without one")
        return ""
    if arguments.tile_captions:
        own = read_tile_captions(file)
        if own is not None:
            return _kept(own, arguments)
        notes.append(f'no "{OF_TILES}" in {file.name}, all tiles have its caption')
    return _kept(read_caption(file), arguments)


def _kept(caption: Caption, arguments: argparse.Namespace) -> Caption:
    """Trimmed, unless it is to be kept as it is."""
    if arguments.keep_captions:
        return caption
    return trim_caption(caption) if isinstance(caption, str) else [trim_caption(one) for one in caption]
