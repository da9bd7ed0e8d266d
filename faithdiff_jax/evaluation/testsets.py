"""Test sets: folders of pictures to restore, of originals to compare with, or of both, as they are distributed.

HR/ and LR/ (also HR_crops/ and LR_crops/, test_HR/ and test_LR/), with Caption/ for texts    pairs
NAME_HR.png and NAME_LR4.png in one folder (RealSR's own)                                      pairs
LR/ alone, or pictures                                                                         no references
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.matching import Matching, match_names, stem
from faithdiff_jax.files.listing import list_pictures

REFERENCE_FOLDERS = ("HR", "HR_crops", "test_HR", "HQ", "GT", "gt")
INPUT_FOLDERS = ("LR", "LR_crops", "test_LR", "LQ", "lq")
CAPTION_FOLDER = "Caption"
MOST_NAMED = 3
SCALE = 4.0
"""Of the sets that papers use, unless they say otherwise."""


class Picture(NamedTuple):
    """One picture of a set: its low-quality file and its original, as far as there are any."""

    input: Path | None
    reference: Path | None


@dataclass(frozen=True)
class TestSet:
    """Pictures by name; the name is the reference's, or the input's where there is none, without suffix.

    Attributes:
        name: for tables and files.
        pictures: by name; empty where only the methods' own folders say what there is.
        captions: folder with a text for each input.
        mismatches: a line for each file that belongs to no other.
        crop: side in pixels of the middle of the inputs that is restored; None for all of it.
        scale: how many times larger a restored picture is on each side.
    """

    name: str
    pictures: Mapping[str, Picture] = field(default_factory=dict)
    captions: Path | None = None
    mismatches: Sequence[str] = ()
    crop: int | None = None
    scale: float = SCALE

    __test__ = False  # not one of pytest's

    @property
    def has_references(self) -> bool:
        """Whether metrics that compare can be computed."""
        return any(picture.reference is not None for picture in self.pictures.values())


def open_set(
    folder: Path, name: str, *, scale: float = SCALE, limit: int | None = None, crop: int | None = None
) -> TestSet:
    """Read the names in a folder of one of the layouts above.

    Args:
        folder: the set.
        name: what it is called.
        scale: see `TestSet`.
        limit: keep this many pictures, the first by name.
        crop: see `TestSet`; for sets without references.

    Raises:
        InputError: no such folder, no pictures, originals without low-quality pictures, or names that fit in two ways.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder (the test set {name})")
    references, inputs = _first(folder, REFERENCE_FOLDERS), _first(folder, INPUT_FOLDERS)
    captions = folder / CAPTION_FOLDER if _holds_anything(folder / CAPTION_FOLDER) else None
    if references is not None and inputs is None:
        raise InputError(f"{folder}: has {references.name}/ but no low-quality pictures ({'/, '.join(INPUT_FOLDERS)}/)")
    if references is None:
        flat = inputs or folder
        names = pictures_of(flat)
        if inputs is None and (split := _by_side(names)):
            found = paired(flat, split[0], flat, split[1])
        else:
            found = named(flat, names, inputs=True)
    else:
        found = paired(inputs or folder, pictures_of(inputs or folder), references, pictures_of(references))
    pictures, mismatches = found
    if not pictures:
        raise InputError(f"{folder}: no picture of it can be used ({mismatches[0] if mismatches else 'it has none'})")
    kept = dict(sorted(pictures.items())[:limit])
    if crop is not None and any(picture.reference is not None for picture in kept.values()):
        raise InputError(f"{folder}: crop is for pictures without references")
    return TestSet(name, kept, captions, mismatches, crop, scale)


def references_only(folder: Path, name: str) -> TestSet:
    """A set whose pictures others have restored: originals alone.

    Raises:
        InputError: no such folder, or no pictures.
    """
    pictures, mismatches = named(folder, pictures_of(folder), inputs=False)
    return TestSet(name, pictures, mismatches=mismatches)


def pictures_of(folder: Path) -> list[str]:
    """Names of the picture files in a folder.

    Raises:
        InputError: no such folder, or none in it.
    """
    names = list(list_pictures(folder).names)
    if not names:
        raise InputError(f"{folder}: holds no pictures")
    return names


def paired(
    input_folder: Path, inputs: Sequence[str], reference_folder: Path, references: Sequence[str]
) -> tuple[dict[str, Picture], list[str]]:
    """Inputs with their references, and a line for each file that is left over.

    Raises:
        InputError: names that fit in two ways.
    """
    matching = match_names(inputs, references)
    if matching.doubt:
        raise InputError(f"{input_folder} and {reference_folder}: {matching.doubt}")
    pictures = {
        stem(reference): Picture(input_folder / name, reference_folder / reference)
        for reference, name in matching.pairs.items()
    }
    return pictures, left_over(matching, str(input_folder), str(reference_folder))


def left_over(matching: Matching, ours: str, theirs: str) -> list[str]:
    """A line for each file that belongs to none of the other side."""
    return [
        *(f"{ours}/{name}: no picture of that name in {theirs}" for name in matching.ours_left),
        *(f"{theirs}/{name}: no picture of that name in {ours}" for name in matching.theirs_left),
    ]


def named(folder: Path, names: Sequence[str], *, inputs: bool) -> tuple[dict[str, Picture], list[str]]:
    """The pictures of one folder alone; those that share a name are left out, with a line each."""
    matching = match_names(names, names)
    pictures = {}
    for name in matching.pairs:
        path = folder / name
        pictures[stem(name)] = Picture(path, None) if inputs else Picture(None, path)
    return pictures, [f"{folder}/{name}: shares its name with another picture" for name in matching.ours_left]


def _holds_anything(folder: Path) -> bool:
    return os.path.isdir(folder) and any(folder.iterdir())


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if os.path.isdir(folder / name)), None)


def _by_side(names: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """Inputs and references of RealSR's own layout, where all names end in _HR or _LR and a digit."""
    references = [name for name in names if stem(name).endswith("_HR")]
    inputs = [name for name in names if stem(name)[:-1].endswith("_LR") and stem(name)[-1] in "234"]
    whole = references and inputs and len(references) + len(inputs) == len(names)
    return (inputs, references) if whole else None


@dataclass(frozen=True, kw_only=True)
class KnownSet:
    """A test set that papers use."""

    title: str
    count: int | None
    """Of pictures; None where copies of the set differ."""
    paired: bool
    """Whether it has originals."""
    made: bool = False
    """Whether its low-quality pictures are made of originals, at three levels."""
    any_layout: bool = False


KNOWN_SETS = {
    "div2k-val": KnownSet(title="DIV2K-Val", count=100, paired=True, made=True),
    "lsdir-val": KnownSet(title="LSDIR-Val", count=250, paired=True, made=True),
    "realphoto60": KnownSet(title="RealPhoto60", count=60, paired=False),
    "realdeg": KnownSet(title="RealDeg", count=238, paired=False),
    "realsr": KnownSet(title="RealSR", count=None, paired=True),
    "drealsr": KnownSet(title="DRealSR", count=None, paired=True),
    "roadtext": KnownSet(title="RoadText", count=200, paired=True, made=True),
    "own": KnownSet(title="own pictures", count=None, paired=False, made=True, any_layout=True),
}
"""Where each is had is in docs/evaluation.md."""


def check_layout(known: KnownSet, folder: Path, *, count: bool = True) -> str:
    """What a set's folder holds, in one line.

    Args:
        known: what it is.
        folder: where it lies.
        count: whether the number of pictures must be the set's.

    Raises:
        InputError: what is wrong with it, in one line.
    """
    found = open_set(folder, known.title)
    if found.mismatches:
        rest = len(found.mismatches) - MOST_NAMED
        listed = "; ".join(found.mismatches[:MOST_NAMED]) + (f"; and {rest} more" if rest > 0 else "")
        raise InputError(f"{folder}: {len(found.mismatches)} files belong to no other: {listed}")
    if known.paired and not found.has_references:
        raise InputError(
            f"{folder}: {known.title} has originals, put them into {REFERENCE_FOLDERS[0]}/ and the low-quality "
            f"pictures into {INPUT_FOLDERS[0]}/"
        )
    if not known.paired and not known.any_layout and found.has_references:
        raise InputError(f"{folder}: {known.title} has no originals, put its pictures into the folder itself")
    if count and known.count not in (None, len(found.pictures)):
        raise InputError(f"{folder}: {len(found.pictures)} pictures, {known.title} has {known.count}")
    kind = "pairs" if found.has_references else "pictures without references"
    return f"{folder}: {known.title}, {len(found.pictures)} {kind}{', with captions' if found.captions else ''}"
