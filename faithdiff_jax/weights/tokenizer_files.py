"""Tokenizer folders of published models: which files belong to them, and how they are copied into a model directory."""

import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.tokenizers import TOKENIZER_FILES
from faithdiff_jax.weights.safetensors_format import FileRecord, record, shown

FILE_NAME = r"(?!\.+$)[A-Za-z0-9_.+@ -]+"
"""Pattern of what a file of a tokenizer may be called."""


def tokenizer_files(folder: pathlib.Path | str, names: Iterable[str]) -> dict[str, pathlib.Path]:
    """The files of a model's tokenizers, as `tokenizer/vocab.json` -> path.

    Raises:
        InputError: a tokenizer that is missing or incomplete, something in its folder that is no file, or a link to a
            file outside.
    """
    found: dict[str, pathlib.Path] = {}
    missing = []
    for name in names:
        tokenizer = pathlib.Path(folder) / name
        if not is_tokenizer(tokenizer):
            missing.append(f"{name}/vocab.json with merges.txt (or tokenizer.json)")
            continue
        inside = _where_links_may_lead(tokenizer)
        for path in sorted(tokenizer.iterdir()):
            if not re.fullmatch(FILE_NAME, path.name):
                raise InputError(f"{tokenizer}: {shown(path.name)!r} is no name of a tokenizer's file")
            if not path.is_file():
                raise InputError(f"{tokenizer}: {shown(path.name)} is no file: a tokenizer folder holds files only")
            if not path.resolve().is_relative_to(inside):
                raise InputError(f"{tokenizer}: {shown(path.name)} is a link to a file outside, it is not copied")
            found[f"{name}/{path.name}"] = path
    if missing:
        raise InputError(f"{folder}: not a diffusers model folder, it has no {', no '.join(missing)}")
    return found


def is_tokenizer(folder: pathlib.Path) -> bool:
    """Whether a folder has the files of a tokenizer."""
    return any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES)


def copy_tokenizers(files: Mapping[str, pathlib.Path], target: pathlib.Path) -> dict[str, FileRecord]:
    """Copy what `tokenizer_files` found into a model directory; returns size and SHA-256 of each."""
    for name, path in files.items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
    return {name: record(target / name) for name in files}


def _where_links_may_lead(folder: pathlib.Path) -> pathlib.Path:
    """The folder itself; in the cache of the Hugging Face hub, whose files are all links, its repository."""
    for parent in folder.absolute().parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent.resolve()
    return folder.resolve()
