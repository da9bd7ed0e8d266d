"""`faithdiff testset`: make the synthetic test sets of originals, and see that a test set lies as it must."""

import argparse
import json
from pathlib import Path
from typing import Any

from faithdiff_jax import __version__
from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli.command import Parser, report_faults
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.testsets import KNOWN_SETS, KnownSet, check_layout
from faithdiff_jax.files.listing import list_images
from faithdiff_jax.files.reading import read_json
from faithdiff_jax.files.writing import write_text

DESCRIPTION = """See that a test set lies as `faithdiff evaluate` reads it; what is wrong is said in one line. With
--originals, make the low-quality pictures of a synthetic set first: DIR/I, DIR/II and DIR/III hold HR/, LR/ and
degradation.json, which says how they were made. Pairs that are there already are left alone."""

LEVELS = ("I", "II", "III")
SETTINGS = "degradation.json"


def build_parser() -> Parser:
    """Describe the flags."""
    parser = Parser(DESCRIPTION)
    add = parser.add_argument
    add("name", choices=[*KNOWN_SETS], help="own is any other folder of pictures or pairs")
    add("folder", type=types.path, metavar="DIR", help="the test set")
    add("--originals", type=types.folder, metavar="DIR", help="photographs to make the set of")
    add(
        "--levels",
        nargs="+",
        choices=LEVELS,
        default=list(LEVELS),
        help="how strong the degradation is, mild to severe",
    )
    add("--seed", type=types.seed, default=0, metavar="N", help="of the degradation; the same seed, the same pictures")
    add("--crop", type=types.whole(4, step=4), metavar="PIXELS", help="keep the middle of each original (default: all)")
    add("--captions", type=types.folder, metavar="DIR", help="folder with a text for each original")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Make what is missing, and check; pictures that cannot be used are listed at the end."""
    known = KNOWN_SETS[arguments.name]
    faults: list[str] = []
    images: list[Path] = []
    if arguments.originals is not None:
        if not known.made:
            raise InputError(f"--originals: {known.title} comes with its low-quality pictures")
        images = list_images(arguments.originals)
        if not images:
            raise InputError(f"{arguments.originals}: holds no pictures")
        for level in arguments.levels:
            faults += _make(arguments, images, level)
    for folder in _folders(known, arguments.folder, arguments.levels, arguments.originals is not None):
        print(check_layout(known, folder, count=arguments.originals is None))
    return report_faults(faults, len(images) * len(arguments.levels), "photographs could not be used")


def _folders(known: KnownSet, folder: Path, levels: list[str], made: bool) -> list[Path]:
    """The folders that hold pairs: a synthetic set has one for each level."""
    if not known.made or (known.any_layout and not made):
        return [folder]
    return [folder / level for level in levels]


def _make(arguments: argparse.Namespace, images: list[Path], level: str) -> list[str]:
    import cv2

    from faithdiff_jax.config import to_dict
    from faithdiff_jax.data.degradation.degrade import LEVELS as CONFIGS
    from faithdiff_jax.data.pairs import make_pairs

    folder = arguments.folder / level
    config = CONFIGS[level]
    settings: dict[str, Any] = {
        "level": level, "seed": arguments.seed, "crop": arguments.crop, "degradation": to_dict(config),
    }  # fmt: skip
    path = folder / SETTINGS
    if path.exists():
        stored = read_json(path)
        before = {key: stored.get(key) for key in settings} if isinstance(stored, dict) else {}
        different = [key for key in settings if before.get(key) != settings[key]]
        if different:
            what = ", ".join(
                key if key == "degradation" else f"{key} {before.get(key)}, now {settings[key]}" for key in different
            )
            raise InputError(f"{folder}: was made with other settings ({what}); name another folder")
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: holds files without {SETTINGS}, name another folder")
    write_text(path, json.dumps({"faithdiff": __version__, **settings}, indent=2) + "\n")
    cv2.setNumThreads(0)
    return make_pairs(images, folder, config, seed=arguments.seed, crop=arguments.crop, captions=arguments.captions)
