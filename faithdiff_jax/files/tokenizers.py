"""CLIP tokenizers: captions to token ids."""

import logging
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.captions import is_unicode
from faithdiff_jax.files.reading import require_file

TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
LARGEST_TOKENIZER_FILE = 1 << 26  # bytes; CLIP's tokenizer.json has two million
LARGEST_VOCABULARY = 1 << 20
LONGEST_CAPTION = 1 << 16  # tokens


class Tokenizers:
    """One CLIP tokenizer for each text encoder, in the order of the encoders."""

    def __init__(self, tokenizers: Sequence[Any]):
        if not tokenizers:
            raise ValueError("0 tokenizers, at least 1 is needed")
        self._tokenizers = tuple(tokenizers)

    @classmethod
    def load(cls, folders: Sequence[Path]) -> "Tokenizers":
        """Load from folders in the published format (`tokenizer/`, `tokenizer_2/`); a bad one raises InputError."""
        return cls([_load_tokenizer(Path(folder)) for folder in folders])

    def __call__(self, captions: Sequence[str]) -> list[Int32[np.ndarray, "captions length"]]:
        """Give the token ids of B captions: one (B, 77) int32 array a tokenizer.

        Each row is the start token, the caption, the end token and padding; a longer caption loses its tail and keeps
        its end token. Length and padding are the folder's own: CLIP-L pads with the end token, bigG with token 0.

        Raises:
            InputError: a caption that is not Unicode.
        """
        if isinstance(captions, str):
            raise TypeError("captions is one string, it must be a list of strings")
        for caption in captions:
            _check_unicode(caption, "caption")
        return [_token_ids(tokenizer, list(captions)) for tokenizer in self._tokenizers]

    def positions(self, caption: str, word: str) -> list[int]:
        """Where the tokens of a word stand in the rows of a caption, wherever the caption has it.

        "Word" is one or several words in a row, such as "red bus"; case does not count, and parts of words are not
        found. The first tokenizer counts, as in `daam`; SDXL's second differs from it after repeated marks ("!!") only.

        Raises:
            InputError: a word that is empty, not in the caption, or cut off because the caption is too long.
        """
        _check_unicode(caption, "caption")
        _check_unicode(word, "word")
        tokenizer = self._tokenizers[0]
        row = tokenizer(caption, verbose=False)["input_ids"]
        tokens = tokenizer(word, verbose=False, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise InputError(f"word is {word!r}: must not be empty")
        starts = [start for start in range(len(row)) if row[start : start + len(tokens)] == tokens]
        if not starts:
            raise InputError(f"word is {word!r}: must be in the caption, {textwrap.shorten(caption, 60)!r}")
        end = tokenizer.model_max_length - 1
        read = [start for start in starts if start + len(tokens) <= end]
        if not read:
            raise InputError(f"word is {word!r}: must be among the caption's first {end - 1} tokens, which are read")
        return sorted({start + i for start in read for i in range(len(tokens))})

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


def _check_unicode(text: str, name: str) -> None:
    if not is_unicode(text):
        raise InputError(f"{name} is {text!a}: must be Unicode text")


def _token_ids(tokenizer: Any, captions: list[str]) -> Int32[np.ndarray, "captions length"]:
    length = tokenizer.model_max_length
    if not captions:
        return np.zeros((0, length), np.int32)
    encoded = tokenizer(captions, padding="max_length", max_length=length, truncation=True)
    return np.asarray(encoded["input_ids"], np.int32)


def _load_tokenizer(folder: Path) -> Any:
    """Load one tokenizer folder, checking first what the library would silently replace by an empty vocabulary."""
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such tokenizer folder")
    if not any(all(os.path.isfile(folder / name) for name in names) for names in TOKENIZER_FILES):
        raise InputError(f"{folder}: a tokenizer folder needs vocab.json and merges.txt, or tokenizer.json")
    _check_files(folder)
    tokenizer_class = _clip_tokenizer_class()
    try:
        tokenizer = tokenizer_class.from_pretrained(str(folder), local_files_only=True)
        ids = tokenizer.get_vocab().values()
        fits = len(tokenizer) <= LARGEST_VOCABULARY and min(ids) >= 0 and max(ids) < LARGEST_VOCABULARY
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot parse
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder}: the tokenizer cannot be loaded ({reason})") from error
    if not fits:
        raise InputError(f"{folder}: token ids must be from 0 to {LARGEST_VOCABULARY - 1:,}")
    # Without a stated length the library assumes 1e30 tokens, and padding to it would exhaust the memory.
    length = tokenizer.model_max_length
    if not isinstance(length, int) or not 2 <= length <= LONGEST_CAPTION:
        raise InputError(f"{folder}: tokenizer_config.json states no model_max_length that can be used (77 for CLIP)")
    return tokenizer


def _check_files(folder: Path) -> None:
    """Refuse what the library would read but should not: pipes, files too large, links to elsewhere.

    A link within the model is fine, and so is one into the store of the Hugging Face cache that the model is part of.
    """
    here = Path(os.path.realpath(folder))
    stores = [parent for parent in here.parents if parent.name.startswith("models--")]
    roots = (here.parent, *stores[:1])
    for name in sorted(os.listdir(folder)):
        if not name.endswith((".json", ".txt")):
            continue
        path = folder / name
        if require_file(path) > LARGEST_TOKENIZER_FILE:
            raise InputError(f"{path}: too large for a tokenizer's file, at most {LARGEST_TOKENIZER_FILE:,} bytes")
        if not any(Path(os.path.realpath(path)).is_relative_to(root) for root in roots):
            raise InputError(f"{path}: is a link to a file outside the model, copy the file here instead")


def _clip_tokenizer_class() -> Any:
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
