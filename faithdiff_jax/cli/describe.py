"""`restore --caption-from`: pictures are described by a vision-language model before they are restored.

The two models are not in memory at the same time.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli.command import Parser
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.captions import trim_caption

INPUT, CLEANED = "input", "cleaned"

Captions = dict[Path, str | InputError]
"""Picture -> its caption, or why it has none."""


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
        help="for --caption-from: any image-text-to-text model (default: faithdiff caption's)",
    )
    add(
        "--clean",
        type=types.path,
        metavar="MODEL_DIR",
        help="for --caption-from cleaned: an RRDBNet, from faithdiff convert --rrdbnet",
    )


def check(arguments: argparse.Namespace) -> None:
    """InputError for flags that lack or exclude one another; nothing is read."""
    source = arguments.caption_from
    if source is not None and (arguments.caption or arguments.captions is not None):
        raise InputError("--caption-from: captions are made, give neither --caption nor --captions")
    if source is None and arguments.captioner is not None:
        raise InputError("--captioner: is for --caption-from, which is not given")
    if source != CLEANED and arguments.clean is not None:
        raise InputError(f"--clean: is for --caption-from {CLEANED}")
    if source == CLEANED and arguments.clean is None:
        raise InputError(f"--caption-from {CLEANED}: needs --clean MODEL_DIR")


def captions_for(pictures: Sequence[Path], arguments: argparse.Namespace) -> Captions:
    """Describe pictures as the flags say, trimmed as in training unless --keep-captions; none without --caption-from.

    Raises:
        InputError: a model that cannot be loaded, or no PyTorch.
    """
    if arguments.caption_from is None:
        return {}
    from faithdiff_jax.cli.caption import load_cleaner, prepare_library
    from faithdiff_jax.data.captioning import MODEL, Captioner, describe

    clean = None if arguments.clean is None else load_cleaner(arguments.clean)
    prepare_library()
    captioner = Captioner.load(arguments.captioner or MODEL)
    found = dict(describe(captioner, pictures, clean=clean))
    if arguments.keep_captions:
        return found
    return {path: trim_caption(text) if isinstance(text, str) else text for path, text in found.items()}
