"""Picture files of a folder: regular files only, in an order that is the same on every machine."""

import itertools
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.reading import printable

PICTURE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    """What is in a folder.

    `names` are the pictures, sorted, as paths within the folder with "/"; Python spells bytes that are not UTF-8 as
    surrogates in them. `skipped` has one line for each name of a picture that is no regular file (a named pipe, a
    socket, a device, a link to one of these or to nothing), `unreadable` one for each folder that cannot be listed.
    """

    folder: Path
    names: tuple[str, ...]
    skipped: tuple[str, ...]
    unreadable: tuple[str, ...]

    @property
    def paths(self) -> list[Path]:
        """The pictures as paths."""
        return [self.folder / name for name in self.names]


def list_pictures(folder: str | os.PathLike[str], *, deep: bool = False) -> Listing:
    """List the pictures of a folder, or with `deep` of all folders in it too, by `PICTURE_SUFFIXES` in any case.

    Hidden files and folders are left out. Links to folders are followed, as data sets are often put together from
    them, but no folder is entered twice.

    Raises:
        InputError: `folder` is not a folder, or cannot be listed.
    """
    root = Path(folder)
    if not os.path.isdir(root):
        raise InputError(f"{folder}: {'not a folder' if os.path.lexists(root) else 'no such folder'}")
    names: list[str] = []
    skipped: list[str] = []
    unreadable: list[str] = []
    seen: set[str] = set()
    waiting = [""]
    while waiting:
        place = waiting.pop()
        path = os.path.join(root, place) if place else os.fspath(root)
        if deep:
            # A link that leads back up would never end.
            real = os.path.realpath(path)
            if real in seen:
                continue
            seen.add(real)
        try:
            with os.scandir(path) as entries:
                # Sorted, so that of two links to one place the same one is followed on every machine.
                visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            fault = f"{printable(path)}: cannot be listed ({error.strerror})"
            if not place:
                raise InputError(fault) from None
            unreadable.append(fault)
            continue
        folders = []
        for entry in visible:
            name = str(PurePosixPath(place, entry.name))
            if _is(entry.is_dir):
                folders.append(name)
            elif entry.name.lower().endswith(PICTURE_SUFFIXES):
                if _is(entry.is_file):
                    names.append(name)
                else:
                    skipped.append(f"{printable(entry.path)}: not a regular file, skipped")
        if deep:
            waiting += reversed(folders)
    return Listing(root, tuple(sorted(names)), tuple(skipped), tuple(unreadable))


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The pictures of `list_pictures`, sorted, without those of subfolders; what is skipped is logged as a warning."""
    listing = list_pictures(folder)
    for line in listing.skipped:
        logger.warning("%s", line)
    return listing.paths


def natural_order(name: str) -> tuple[tuple[str, int], ...]:
    """A key to sort names by, so that frame2 comes before frame10: text as text, digits (0-9) as numbers."""
    parts = re.split("([0-9]+)", name)
    return tuple((text, int(digits or -1)) for text, digits in itertools.zip_longest(parts[::2], parts[1::2]))


def _is(question: Callable[[], bool]) -> bool:
    """Ask an entry what it is; a link in a circle, or to where one may not look, is neither file nor folder."""
    try:
        return question()
    except OSError:
        return False
