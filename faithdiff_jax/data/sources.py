"""Where training pictures come from: random-access sources of encoded records, checked and counted when opened.

A source knows nothing of randomness, crops or tokens; it gives record `index` of `len(source)`, the same each time.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from faithdiff_jax.data.decode import header_size
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.captions import find_caption, read_caption
from faithdiff_jax.files.listing import PICTURE_SUFFIXES, list_pictures
from faithdiff_jax.files.places import is_remote
from faithdiff_jax.files.reading import read_bytes

PAIR_SCALE = 4
HQ_FOLDERS = ("HR_crops", "HR")
LQ_FOLDERS = ("LR_crops", "LR")
CAPTION_FOLDER = "Caption"
LARGEST_FILE = 1 << 30  # bytes of an encoded picture
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One picture as it is stored: still encoded, and nothing drawn yet.

    `hq` is the encoded HQ picture. `lq` holds the encoded LQ pictures to choose from, each a quarter of its size; it is
    empty where the LQ picture is made by degradation. `caption` is the text before trimming, "" if there is none.
    """

    name: str
    hq: bytes
    lq: tuple[bytes, ...] = ()
    caption: str = ""


class Source(Protocol):
    """Records by number, from a `folder`; `summary` says in one line what was found there.

    `source[index]` raises InputError, naming the file, for a record that cannot be read.
    """

    folder: str
    summary: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def name(self, index: int) -> str:
        """Say which file a record is, without reading it."""
        ...

    def fingerprint(self) -> str:
        """A short text that changes with the names and sizes of the files, without reading them.

        By it a run that is resumed notices that a picture was replaced by another of its name.
        """
        ...


class PhotoFolder:
    """HQ photographs under a folder, at any depth, whose LQ pictures are made while training.

    A caption is looked for beside each photograph, or at the same place under `captions`. Raises InputError if there
    are no photographs, if a caption file is broken, or if a folder of captions fits none of the photographs.
    """

    def __init__(self, folder: Path | str, captions: Path | str | None = None):
        self.folder = _existing(folder)
        if _first_folder(self.folder, HQ_FOLDERS) and _lq_folders(self.folder):
            raise InputError(f"{folder}: holds HQ and LQ pictures, use it as pairs; its photographs are in a subfolder")
        self._files = _pictures(self.folder)
        self._captions = _Captions(self.folder, self._files, captions, self.folder)
        self.summary = f"{folder}: {len(self._files):,} photographs, {self._captions.summary}"

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        name = self.name(index)
        return Record(name=name, hq=_read(name), caption=self._captions[index])

    def name(self, index: int) -> str:
        """Give the photograph's path."""
        return os.path.join(self.folder, self._files[index])

    def fingerprint(self) -> str:
        """A digest of the names and sizes of photographs and captions."""
        return fingerprint([*_sizes(self.folder, self._files), *self._captions.sizes()])


class PairFolder:
    """HQ pictures with LQ pictures a quarter of their size, in the published layout or the one `make_pairs` writes.

    `HR_crops/` or `HR/`; `LR_crops/` or `LR/`, or several alternatives `LR_crops_1/`, `LR_crops_2/` (the published
    faces), of which training picks one at random; and, unless `captions` names another folder, `Caption/`. Files
    belong together by their path without suffix. Raises InputError for a missing folder, pictures without partner,
    sizes that are not exactly 1:4 (read from the headers) and broken captions.

    Source: FaithDiff's `dataloader/Realesrgan_offline_dataset.py`.
    """

    def __init__(self, folder: Path | str, captions: Path | str | None = None):
        root = self.folder = _existing(folder)
        hq_folder, lq_folders = _first_folder(root, HQ_FOLDERS), _lq_folders(root)
        if not hq_folder or not lq_folders:
            raise InputError(f"{folder}: pairs need {' or '.join(HQ_FOLDERS)}, and {' or '.join(LQ_FOLDERS)}")
        self._hq_folder, self._lq_folders = hq_folder, lq_folders
        self._hq = _pictures(hq_folder)
        self._lq = [_partners(hq_folder, self._hq, lq_folder) for lq_folder in lq_folders]
        _stop_for_any(map(self._size_fault, range(len(self._hq))), folder, "pairs do not fit")
        usual = _first_folder(root, [CAPTION_FOLDER]) or hq_folder
        self._captions = _Captions(hq_folder, self._hq, captions, usual)
        choices = f" with {len(self._lq)} LQ pictures each" if len(self._lq) > 1 else ""
        self.summary = f"{folder}: {len(self._hq):,} pairs{choices}, {self._captions.summary}"

    def __len__(self) -> int:
        return len(self._hq)

    def __getitem__(self, index: int) -> Record:
        name = self.name(index)
        lq = tuple(_read(path) for path in self._lq_paths(index))
        return Record(name=name, hq=_read(name), lq=lq, caption=self._captions[index])

    def name(self, index: int) -> str:
        """Give the HQ picture's path."""
        return os.path.join(self._hq_folder, self._hq[index])

    def fingerprint(self) -> str:
        """A digest of the names and sizes of HQ pictures, LQ pictures and captions."""
        sizes = list(_sizes(self._hq_folder, self._hq))
        for folder, files in zip(self._lq_folders, self._lq, strict=True):
            sizes += _sizes(folder, files)
        return fingerprint([*sizes, *self._captions.sizes()])

    def _lq_paths(self, index: int) -> list[str]:
        return [os.path.join(folder, files[index]) for folder, files in zip(self._lq_folders, self._lq, strict=True)]

    def _size_fault(self, index: int) -> str | None:
        try:
            hq = header_size(Path(self.name(index)), self.name(index))
            for path in self._lq_paths(index):
                check_pair_size(hq, header_size(Path(path), path), path)
        except InputError as error:
            return str(error)
        return None


def check_pair_size(hq: Sequence[int], lq: Sequence[int], name: str) -> None:
    """Raise InputError unless the HQ height and width are exactly four times the LQ picture's."""
    if (hq[0], hq[1]) != (PAIR_SCALE * lq[0], PAIR_SCALE * lq[1]):
        sizes = f"LQ {lq[1]}x{lq[0]}, HQ {hq[1]}x{hq[0]}"
        raise InputError(f"{name}: {sizes} (width x height), the HQ picture must be {PAIR_SCALE} times as large")


def fingerprint(sizes: Iterable[tuple[str, int]]) -> str:
    """A digest of names with their sizes, 32 hexadecimal digits; it changes with any of them, or their order."""
    digest = hashlib.sha256()
    for name, size in sizes:
        digest.update(os.fsencode(name) + b"\0%d\n" % size)
    return digest.hexdigest()[:32]


class _Captions:
    """The captions of a list of pictures, found and checked at the start, and read again when they are needed.

    They are looked for in the folder `given`, where at least one must be found, or else in the `usual` one.
    """

    def __init__(self, pictures_folder: str, pictures: Sequence[str], given: Path | str | None, usual: str):
        self._folder = usual if given is None else _existing(given)
        self._files = [_caption_file(self._folder, picture) for picture in pictures]
        found = sum(bool(file) for file in self._files)
        if given is not None and not found:
            raise InputError(f"{given}: no caption there has the name of a picture in {pictures_folder}")
        _stop_for_any(map(self._fault, range(len(pictures))), self._folder, "captions cannot be used")
        self.summary = f"{found:,} with a caption"

    def __getitem__(self, index: int) -> str:
        file = self._files[index]
        return read_caption(Path(self._folder, file)) if file else ""

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Each caption file's name and size."""
        return _sizes(self._folder, [file for file in self._files if file])

    def _fault(self, index: int) -> str | None:
        try:
            self[index]
        except InputError as error:
            return str(error)
        return None


def _caption_file(folder: str, picture: str) -> str:
    """Give the caption's path within `folder`, or "" for none. Strings: there may be millions, in every worker."""
    relative = PurePosixPath(picture)
    found = find_caption(Path(picture), Path(folder, relative.parent))
    return "" if found is None else str(relative.parent / found.name)


def _existing(folder: Path | str) -> str:
    if is_remote(folder):
        raise InputError(
            f"{folder}: pictures are read from folders of this machine; pack them with `faithdiff shards`, and give "
            "their shards instead"
        )
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    return os.fspath(folder)


def _first_folder(root: str, names: Iterable[str]) -> str | None:
    return next((path for name in names if os.path.isdir(path := os.path.join(root, name))), None)


def _lq_folders(root: str) -> list[str]:
    single = _first_folder(root, LQ_FOLDERS)
    if single:
        return [single]
    numbered = (entry for entry in sorted(os.listdir(root)) if entry.startswith(f"{LQ_FOLDERS[0]}_"))
    return [path for entry in numbered if os.path.isdir(path := os.path.join(root, entry))]


def _pictures(folder: str) -> list[str]:
    """List the pictures under a folder, all of which must be listed: a part of a data set is another data set."""
    listing = list_pictures(folder, deep=True)
    if listing.unreadable:
        raise InputError(listing.unreadable[0])
    for line in listing.skipped:
        logger.warning("%s", line)
    if not listing.names:
        raise InputError(f"{folder}: no pictures ({', '.join(PICTURE_SUFFIXES)}) there, at any depth")
    return list(listing.names)


def _partners(hq_folder: str, hq: Sequence[str], lq_folder: str) -> list[str]:
    """Give the LQ pictures in the order of the HQ pictures."""
    ours, theirs = _by_stem(hq_folder, hq), _by_stem(lq_folder, _pictures(lq_folder))
    for here, there, there_folder in ((ours, theirs, lq_folder), (theirs, ours, hq_folder)):
        alone = sorted(here[stem] for stem in here.keys() - there.keys())
        if alone:
            raise InputError(f"{there_folder}: {len(alone):,} pictures have no partner there, the first is {alone[0]}")
    return [theirs[stem] for stem in ours]


def _by_stem(folder: str, files: Sequence[str]) -> dict[str, str]:
    stems: dict[str, str] = {}
    for file in files:
        stem = file.rpartition(".")[0]
        if stem in stems:
            raise InputError(f"{folder}: {stems[stem]} and {file} differ in their suffix only, keep one")
        stems[stem] = file
    return stems


def _sizes(folder: str, files: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Each file's name and size, -1 for one that is gone: what that means is for the reader of its record to say."""
    for file in files:
        try:
            yield file, os.stat(os.path.join(folder, file)).st_size
        except OSError:
            yield file, -1


def _stop_for_any(faults: Iterable[str | None], folder: Path | str, what: str) -> None:
    """Raise one InputError for all faults, with their number and the first of them."""
    found = [fault for fault in faults if fault is not None]
    if found:
        raise InputError(f"{folder}: {len(found):,} {what}; the first: {found[0]}")


def _read(path: str) -> bytes:
    return read_bytes(path, LARGEST_FILE, "picture")
