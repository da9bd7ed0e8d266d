"""Which pictures belong together: of each name, the input, every method's result and the reference.

    method -> folder, or name -> file  --compare-->  Comparison  --groups-->  Group, one name after the other

Galleries (`gallery`), sheets (`sheets`) and counts of words (`ocr`) are made of it. Names are those of the references'
files without their suffix; of the inputs' or the first method's where there are none. `matching` says which of the
others belong to them.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from faithdiff_jax.config import shown
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.matching import match_names, stem
from faithdiff_jax.files.images import load_image
from faithdiff_jax.files.listing import list_images

INPUT, BICUBIC, REFERENCE = "input", "bicubic", "reference"
LONGEST_NAME = 60
MOST_NAMED = 5  # of pictures that are missing, in one line

Picture = UInt8[np.ndarray, "_ _ 3"]
Source = str | os.PathLike[str] | Mapping[str, Path]
"""A folder, or the file of each name."""


class Group(NamedTuple):
    """Everything there is of one name.

    `pictures` are uint8 RGB by column, those that could be read. `size` (H, W) is the reference's or, without one, the
    largest picture's: what all are shown at. `notes` say what is odd, `faults` what could not be read, a line each.
    """

    name: str
    pictures: dict[str, Picture]
    size: tuple[int, int]
    notes: list[str]
    faults: list[str]


@dataclass(frozen=True)
class Comparison:
    """Files by column and name. `columns` are in order: input, bicubic, the methods, reference."""

    files: Mapping[str, Mapping[str, Path]]
    columns: tuple[str, ...]
    methods: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def missing(self) -> list[str]:
        """A line for each column that lacks pictures which another one has."""
        lines = []
        for column, files in self.files.items():
            lacking = [name for name in self.names if name not in files]
            if lacking:
                rest = f" and {len(lacking) - MOST_NAMED} more" if len(lacking) > MOST_NAMED else ""
                lines.append(f"{column} has no {', '.join(map(repr, lacking[:MOST_NAMED]))}{rest}")
        return lines

    def groups(self, names: Sequence[str] | None = None) -> Iterator[Group]:
        """Read what there is of each name, or of these names, one after the other."""
        for name in self.names if names is None else names:
            yield self._read(name)

    def opposites(self) -> tuple[str, str]:
        """The two columns to begin with: the plainest one and the last method.

        Raises:
            InputError: there is only one.
        """
        if len(self.columns) < 2:
            raise InputError(
                f"{self.columns[0]} alone is nothing to compare: give another method, inputs or references"
            )
        right = self.methods[-1]
        plain = [column for column in (BICUBIC, INPUT, *self.methods, REFERENCE) if column in self.columns]
        return next(column for column in plain if column != right), right

    def _read(self, name: str) -> Group:
        found: dict[str, Picture] = {}
        faults, notes = [], []
        for column, files in self.files.items():
            if name not in files:
                continue
            try:
                read = load_image(files[name])
            except InputError as error:
                faults.append(str(error))
                continue
            found[column] = read.rgb
            if read.alpha is not None:
                notes.append(f"{column}: the alpha channel is not shown")
        size = _frame(found)
        if INPUT in found and BICUBIC in self.columns and BICUBIC not in self.files:
            enlarged = Image.fromarray(found[INPUT]).resize(size[::-1], Image.Resampling.BICUBIC)
            found[BICUBIC] = np.array(enlarged)
        for column, picture in found.items():
            if column != INPUT and picture.shape[:2] != size:
                height, width = picture.shape[:2]
                notes.append(f"{column} has {width}x{height} pixels, shown at {size[1]}x{size[0]}")
        return Group(name, {column: found[column] for column in self.columns if column in found}, size, notes, faults)


def compare(
    methods: Mapping[str, Source],
    *,
    inputs: Source | None = None,
    references: Source | None = None,
    ending: str | None = None,
) -> Comparison:
    """Put together what belongs together.

    Args:
        methods: the results of each method, by its name.
        inputs: the low-quality pictures; they add the columns "input" and "bicubic" (enlarged as Pillow does it, unless
            a method of that name is given).
        references: the true pictures, the column "reference".
        ending: what the methods' files have behind the picture's name, where it cannot be told from the names.

    Raises:
        InputError: no method, a name that cannot be used, a folder that cannot be listed or has no pictures,
            two pictures of one name in a folder, names that can be read in several ways, or no file with the ending.
    """
    given = dict(methods)
    if not given:
        raise InputError("no method: name at least one, and the folder of its pictures")
    for name in given:
        _check_name(name, given, [INPUT] * (inputs is not None) + [REFERENCE] * (references is not None))
    if inputs is not None:
        given = {INPUT: inputs, **given}
    if references is not None:
        given[REFERENCE] = references
    files = {column: _files(column, source) for column, source in given.items()}
    first = REFERENCE if references is not None else next(iter(given))
    for column, source in given.items():
        if column != first and not isinstance(source, Mapping):
            files[column] = _named_as(files[first], column, files[column], ending if column in methods else None)
    columns = [*given]
    if inputs is not None and BICUBIC not in given:
        columns.insert(1, BICUBIC)
    names = tuple(sorted(set().union(*(files[method] for method in methods))))
    return Comparison(files, tuple(columns), tuple(methods), names)


def _check_name(name: str, names: Mapping[str, Source], taken: Sequence[str]) -> None:
    if not name.strip() or len(name) > LONGEST_NAME:
        raise InputError(f"method {shown(name)}: its name must have 1 to {LONGEST_NAME} letters")
    if name in taken:
        raise InputError(f"method {name}: the name is taken by the {name} pictures, choose another")
    if sum(name.casefold() == other.casefold() for other in names) > 1:
        raise InputError(f"method {name}: differs from another one in upper and lower case only, choose another name")


def _files(column: str, source: Source) -> Mapping[str, Path]:
    if isinstance(source, Mapping):
        if not source:
            raise InputError(f"{column}: no pictures")
        return source
    files: dict[str, Path] = {}
    for path in list_images(source):
        other = files.setdefault(stem(path.name), path)
        if other != path:
            raise InputError(f"{source}: {other.name} and {path.name} have one name, keep one of them")
    if not files:
        raise InputError(f"{source}: no pictures in it")
    return files


def _named_as(
    first: Mapping[str, Path], column: str, files: Mapping[str, Path], ending: str | None
) -> Mapping[str, Path]:
    """A column's files under the names of those they belong to; others keep their own."""
    by_file = {path.name: path for path in files.values()}
    matching = match_names(by_file, [f"{name}.png" for name in first], ending)
    if matching.doubt:
        raise InputError(f"{column}: {matching.doubt}")
    named = {stem(theirs): by_file[ours] for theirs, ours in matching.pairs.items()}
    for left in matching.ours_left:
        named[left if stem(left) in named else stem(left)] = by_file[left]
    return named


def _frame(found: Mapping[str, Picture]) -> tuple[int, int]:
    """Height and width of the reference, or of the picture with the most pixels."""
    if not found:
        return 0, 0
    picture = found.get(REFERENCE)
    if picture is None:
        picture = max(found.values(), key=lambda one: one.shape[0] * one.shape[1])
    height, width = picture.shape[:2]
    return height, width
