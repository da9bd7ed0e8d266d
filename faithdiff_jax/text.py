"""Captions: read from files, trimmed as in training, turned into token ids."""

import json
import logging
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from faithdiff_jax.errors import InputError

CAPTION_SUFFIXES = (".json", ".txt")
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


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
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"caption": caption}, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


class Tokenizers:
    """One CLIP tokenizer for each text encoder, in the order of the encoders."""

    def __init__(self, tokenizers: Sequence):
        if not tokenizers:
            raise ValueError("0 tokenizers, at least 1 is needed")
        self._tokenizers = tuple(tokenizers)

    @classmethod
    def load(cls, folders: Sequence[Path]) -> "Tokenizers":
        """Load from folders in the published format (`tokenizer/`, `tokenizer_2/`); a bad one raises InputError."""
        return cls([_load_tokenizer(Path(folder)) for folder in folders])

    def __call__(self, captions: Sequence[str]) -> list[np.ndarray]:
        """Give the token ids of B captions: one (B, 77) int32 array a tokenizer.

        Each row is the start token, the caption, the end token and padding; a longer caption loses its tail and keeps
        its end token. Length and padding are the folder's own: CLIP-L pads with the end token, bigG with token 0.
        """
        if isinstance(captions, str):
            raise TypeError("captions is one string, it must be a list of strings")
        return [_token_ids(tokenizer, list(captions)) for tokenizer in self._tokenizers]

    @property
    def vocabulary_sizes(self) -> list[int]:
        """How many token ids each tokenizer may give."""
        return [len(tokenizer) for tokenizer in self._tokenizers]

    def save(self, folder: Path) -> list[Path]:
        """Write the tokenizers to `folder`/tokenizer, `folder`/tokenizer_2, ...; returns these, for `load`."""
        names = ["tokenizer", *(f"tokenizer_{number}" for number in range(2, len(self._tokenizers) + 1))]
        targets = [Path(folder) / name for name in names]
        for tokenizer, target in zip(self._tokenizers, targets, strict=True):
            tokenizer.save_pretrained(str(target))
        return targets


def _token_ids(tokenizer, captions: list[str]) -> np.ndarray:
    length = tokenizer.model_max_length
    if not captions:
        return np.zeros((0, length), np.int32)
    encoded = tokenizer(captions, padding="max_length", max_length=length, truncation=True)
    return np.asarray(encoded["input_ids"], np.int32)


def _load_tokenizer(folder: Path):
    """Load one tokenizer folder, checking first what the library would silently replace by an empty vocabulary."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such tokenizer folder")
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        raise InputError(f"{folder}: a tokenizer folder needs vocab.json and merges.txt, or tokenizer.json")
    tokenizer_class = _clip_tokenizer_class()
    try:
        tokenizer = tokenizer_class.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot parse
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder}: the tokenizer cannot be loaded ({reason})") from error
    # Without a stated length the library assumes 1e30 tokens, and padding to it would exhaust the memory.
    if tokenizer.model_max_length > 1_000_000:
        raise InputError(f"{folder}: tokenizer_config.json states no model_max_length (77 for CLIP)")
    return tokenizer


def _clip_tokenizer_class():
    """Import the tokenizer late (it takes seconds), without the notice that models need PyTorch: ours do not."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(is_wanted)
    try:
        from transformers import CLIPTokenizer
    finally:
        logger.removeFilter(is_wanted)
    return CLIPTokenizer
