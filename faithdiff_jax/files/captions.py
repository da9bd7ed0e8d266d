"""Captions: read from files, written, trimmed as in training."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.reading import parse_json, read_text
from faithdiff_jax.files.writing import write_text

Caption = str | Sequence[str]
"""What a picture shows; or what each of its tiles shows, from left to right and then down."""

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels of a picture; the last two are those after it."""
Told = TypeVar("Told")

CAPTION_SUFFIXES = (".json", ".txt")
OF_TILES = "tile_captions"
"""The key of a `.json` file that has a caption for each tile."""
MOST_WORDS = 75
"""What the text encoders can read of a caption: 77 tokens less those of start and end, and a word is one or more."""
CAPTION_LIMIT = 1 << 20  # bytes; the text encoders read about 300


def is_unicode(text: str) -> bool:
    """Whether it is whole characters: a command line of other bytes holds halves, which no tokenizer takes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def trim_caption(text: str) -> str:
    """Cut a LLaVA caption ("The image features ...") to what the model was trained on.

    The first three words go, whatever they are; the next is capitalised (its other letters lowered); two sentences
    stay. A full stop is always added, so a caption that ends within those two sentences ends in two, as published.
    A caption of one to three words, on which the published rule fails, is kept as it is; an empty one gives "".

    Source: the caption handling of the published inference and data code.
    """
    words = text.split()
    if len(words) <= 3:
        return text.strip()
    kept = [words[3].capitalize(), *words[4:]]
    sentences = " ".join(kept).split(". ")
    return ". ".join(sentences[:2]) + "."


def too_long(caption: Caption) -> list[str]:
    """A sentence if a caption has more words than the text encoders read, and nothing otherwise."""
    words = max((len(one.split()) for one in ([caption] if isinstance(caption, str) else caption)), default=0)
    said = f"a caption of {words:,} words, of which the text encoders read the first {MOST_WORDS} at most"
    return [said] * (words > MOST_WORDS)


def find_caption(image_path: Path, folder: Path) -> Path | None:
    """Find an image's caption file in `folder`, or None: for cat.png cat.json, cat.txt, cat.png.json, cat.png.txt."""
    names = (image_path.stem + suffix for suffix in CAPTION_SUFFIXES)
    long_names = (image_path.name + suffix for suffix in CAPTION_SUFFIXES)
    # os.path's question: that of Path raises for a name too long, as a picture's with one more suffix can be.
    return next((folder / name for name in (*names, *long_names) if os.path.isfile(folder / name)), None)


def read_caption(path: Path) -> str:
    """Read a caption: the "caption" of a `.json` file, or the whole of a `.txt` file, without outer white space.

    Raises:
        InputError: no such file, a file over `CAPTION_LIMIT` bytes, or anything else in it.
    """
    suffix = path.suffix.lower()
    if suffix not in CAPTION_SUFFIXES:
        raise InputError(f"{path}: a caption file ends in {' or '.join(CAPTION_SUFFIXES)}")
    text = read_text(path, CAPTION_LIMIT, "caption file")
    return (_caption_of(parse_json(text, path), path) if suffix == ".json" else text).strip()


def describe_boxes(picture: np.ndarray, boxes: Sequence[Box], describe: Callable[[np.ndarray], Told]) -> list[Told]:
    """What is said of each part of a picture (H, W, 3); equal parts are looked at once."""
    told = {
        (left, top, right, bottom): describe(picture[top:bottom, left:right])
        for left, top, right, bottom in dict.fromkeys(boxes)
    }
    return [told[box] for box in boxes]


def read_tile_captions(path: Path) -> list[str] | None:
    """Read the captions of a picture's tiles, the "tile_captions" of a `.json` file; None for a file without.

    Raises:
        InputError: as `read_caption`, or they are no list of texts.
    """
    if path.suffix.lower() != ".json":
        return None
    content = parse_json(read_text(path, CAPTION_LIMIT, "caption file"), path)
    if not isinstance(content, dict) or OF_TILES not in content:
        return None
    captions = content[OF_TILES]
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise InputError(f'{path}: "{OF_TILES}" must be a list of strings, one for each tile')
    return [caption.strip() for caption in captions]


def _caption_of(content: Any, path: Path) -> str:
    """Take the caption out of a JSON file's content."""
    if not isinstance(content, dict) or "caption" not in content:
        raise InputError(f'{path}: no "caption" key; a caption file is {{"caption": "..."}}')
    caption = content["caption"]
    if not isinstance(caption, str):
        raise InputError(f'{path}: "caption" is {type(caption).__name__}, it must be a string')
    return caption


def write_caption(path: Path, caption: str) -> None:
    """Write a caption file, whole or not at all, and the folders above it; InputError if that cannot be done."""
    write_text(path, json.dumps({"caption": caption}, ensure_ascii=False) + "\n")
