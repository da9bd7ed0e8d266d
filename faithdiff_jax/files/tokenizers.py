"""CLIP tokenizers: captions to token ids."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from faithdiff_jax.errors import InputError

TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


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
