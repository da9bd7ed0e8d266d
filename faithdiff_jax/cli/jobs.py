"""What a run of `faithdiff restore` does: one job for each result, and the names of its files."""

import dataclasses
import os
import pathlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.listing import PICTURE_SUFFIXES, list_images


@dataclasses.dataclass(frozen=True)
class Job:
    """One result: of which picture and seed, where it goes, and where a comparison and the maps of words would go."""

    source: pathlib.Path
    target: pathlib.Path
    sheet: pathlib.Path
    maps: dict[str, pathlib.Path]
    seed: int


def plan_jobs(
    source: pathlib.Path, folder: pathlib.Path, suffix: str, words: Sequence[str] = (), seeds: Sequence[int] = (42,)
) -> list[Job]:
    """One job for every picture and seed, no two of which write to one file, also where case does not tell names apart.

    Inputs that share a stem keep their suffix in the result's name, and several seeds are in it; a name that is still
    taken is numbered.

    Raises:
        InputError: no pictures, or a folder for the results that is the pictures' own.
    """
    if os.path.isdir(source):
        files = list_images(source)
        if not files:
            known = ", ".join(PICTURE_SUFFIXES)
            raise InputError(f"{source}: holds no pictures (files that end in {known})")
    elif os.path.exists(source):
        files = [source]
    else:
        raise InputError(f"{source}: no such file or folder")
    if os.path.realpath(folder) == os.path.realpath(source if os.path.isdir(source) else source.parent):
        raise InputError(f"--output {folder}: is where the input lies, name another folder")
    stems = Counter(_same_file(file.stem) for file in files)
    alone = {file for file in files if stems[_same_file(file.stem)] == 1}
    taken: set[str] = set()
    stem: dict[tuple[pathlib.Path, int], str] = {}
    for file in sorted(files, key=lambda file: file not in alone):  # those keep their names
        name = file.stem if file in alone else file.name.replace(".", "_")
        for seed in seeds:
            free = _free_name(name if len(seeds) == 1 else f"{name}_seed{seed}", suffix, taken)
            stem[file, seed] = free.removesuffix(f".{suffix}")
    each = [(file, seed) for file in files for seed in seeds]
    sheets = {one: folder / _free_name(f"{stem[one]}_compare", "png", taken) for one in each}
    maps = {
        one: {word: folder / _free_name(f"{stem[one]}_attribution_{_slug(word)}", "png", taken) for word in words}
        for one in each
    }
    return [Job(one[0], folder / f"{stem[one]}.{suffix}", sheets[one], maps[one], one[1]) for one in each]


def _slug(word: str) -> str:
    """A word of a caption as part of a file's name: letters and digits, not too many."""
    return re.sub(r"\W+", "_", word).strip("_")[:40] or "word"


def _free_name(stem: str, suffix: str, taken: set[str]) -> str:
    """`stem`.`suffix`, or `stem`_2.`suffix` and so on; marked as taken."""
    name, number = f"{stem}.{suffix}", 1
    while _same_file(name) in taken:
        number += 1
        name = f"{stem}_{number}.{suffix}"
    taken.add(_same_file(name))
    return name


def _same_file(name: str) -> str:
    """Equal for names that some file system takes for one: of other case, or other Unicode composition."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
