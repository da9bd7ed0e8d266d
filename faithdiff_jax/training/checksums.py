"""SHA-256 of every file of a checkpoint, kept in a manifest inside it: a byte that changes later is found and named.

    STEP/checksums.json    {"state/manifest.ocdbt": "9f86d0...", ...}

It is written before the checkpoint gets its name, and completed after it: Orbax writes two small files of its own as it
renames the folder, with the time of that. A run that is killed in between has all but these two checked.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.places import is_remote, names_below
from faithdiff_jax.files.reading import read_json
from faithdiff_jax.files.writing import write_text

MANIFEST = "checksums.json"
METADATA = "_CHECKPOINT_METADATA"
COMMITTED = "commit_success.txt"
WRITTEN_LATE = (METADATA, COMMITTED)
LARGEST_MANIFEST = 64 * 2**20  # bytes; a file has a line of about 100
# Hashing lets go of the interpreter's lock; more threads would take cores from a training step on the CPU.
THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))


def write_checksums(folder: pathlib.Path) -> None:
    """Hash every file of a checkpoint that is complete but for its name, and write the manifest.

    Raises:
        OSError: a file cannot be read, or the manifest cannot be written.
    """
    names = [name for name in sorted(_entries(folder)) if name not in WRITTEN_LATE]
    with ThreadPoolExecutor(THREADS) as pool:
        checksums = dict(zip(names, pool.map(lambda name: _hash(folder / name), names), strict=True))
    # The folder is renamed as a whole once this is there.
    (folder / MANIFEST).write_text(json.dumps(checksums, indent=0), encoding="utf-8")


def complete_checksums(folder: pathlib.Path) -> None:
    """Add what Orbax wrote as it renamed the folder.

    Raises:
        InputError: the manifest cannot be written.
        OSError: a file cannot be read.
        ValueError: the manifest is damaged already.
    """
    late = {name: _hash(folder / name) for name in WRITTEN_LATE if (folder / name).is_file()}
    write_text(folder / MANIFEST, json.dumps(_manifest(folder) | late, indent=0))


def read_checksums(folder: pathlib.Path) -> dict[str, str]:
    """The manifest's checksums by file name, once the files' names are seen to be those of the manifest.

    Raises:
        ValueError: the manifest is damaged, a file is missing, or there is one that it does not know.
    """
    checksums = _manifest(folder)
    found = _entries(folder)
    for name in sorted(checksums):
        if name not in found:
            raise ValueError(f"{name} is missing")
    for name in sorted(found):
        if name not in checksums and name not in WRITTEN_LATE:
            raise ValueError(f"{name} is in it, which is not of this checkpoint")
        if not found[name]:
            raise ValueError(f"{name} is not a plain file")
    return checksums


def first_changed(folder: pathlib.Path, checksums: Mapping[str, str], names: Iterable[str]) -> str | None:
    """The first of these files whose bytes are not those of the checksum, or None."""

    def changed(name: str) -> bool:
        try:
            return _hash(folder / name) != checksums[name]
        except OSError:
            return True

    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return next((name for name, found in zip(names, pool.map(changed, names), strict=True) if found), None)


def _manifest(folder: pathlib.Path) -> dict[str, str]:
    try:
        checksums = read_json(folder / MANIFEST, LARGEST_MANIFEST)
    except InputError:
        checksums = None
    if not isinstance(checksums, dict) or not all(isinstance(value, str) for value in checksums.values()):
        raise ValueError(f"{MANIFEST} is not what was written")
    return checksums


def _entries(folder: pathlib.Path) -> dict[str, bool]:
    """Relative path of everything in a checkpoint that is not a folder -> whether it is a plain file.

    Without the manifest, and without what replacing it leaves where that is cut short.
    """
    entries = {}
    for name, path in names_below(folder):
        replacement = "/" not in name and name.startswith(".") and name.endswith(".tmp")
        if name != MANIFEST and not replacement:
            entries[name] = is_remote(path) or (path.is_file() and not path.is_symlink())
    return entries


def _hash(path: pathlib.Path) -> str:
    """SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
