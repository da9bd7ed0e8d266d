"""Captions: read from files, written, trimmed as in training."""

import json
from pathlib import Path

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.writing import write_text

CAPTION_SUFFIXES = (".json", ".txt")


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


def find_caption(image_path: Path, folder: Path) -> Path | None:
    """Find an image's caption file in `folder`, or None: for cat.png cat.json, cat.txt, cat.png.json, cat.png.txt."""
    names = (image_path.stem + suffix for suffix in CAPTION_SUFFIXES)
    long_names = (image_path.name + suffix for suffix in CAPTION_SUFFIXES)
    return next((folder / name for name in (*names, *long_names) if (folder / name).is_file()), None)


def read_caption(path: Path) -> str:
    """Read a caption: the "caption" of a `.json` file, or the whole of a `.txt` file, without outer white space.

    Anything else in the file, or no such file, raises InputError naming the file and what is wrong with it.
    """
    if path.suffix.lower() not in CAPTION_SUFFIXES:
        raise InputError(f"{path}: a caption file ends in {' or '.join(CAPTION_SUFFIXES)}")
    try:
        # "-sig" drops the byte order mark some editors write, which would otherwise become part of the caption.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the caption file is not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise InputError(f"{path}: the caption file cannot be read ({error.strerror})") from error
    return (_caption_of(text, path) if path.suffix.lower() == ".json" else text).strip()


def _caption_of(text: str, path: Path) -> str:
    """Take the caption out of a JSON file's text."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON (line {error.lineno}: {error.msg})") from error
    if not isinstance(content, dict) or "caption" not in content:
        raise InputError(f'{path}: no "caption" key; a caption file is {{"caption": "..."}}')
    caption = content["caption"]
    if not isinstance(caption, str):
        raise InputError(f'{path}: "caption" is {type(caption).__name__}, it must be a string')
    # JSON can spell half of a character ("\ud83d" alone), which no tokenizer takes.
    if any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise InputError(f'{path}: "caption" is not valid Unicode (an unpaired surrogate)')
    return caption


def write_caption(path: Path, caption: str) -> None:
    """Write a caption file, whole or not at all, and the folders above it; InputError if that cannot be done."""
    write_text(path, json.dumps({"caption": caption}, ensure_ascii=False) + "\n")
