"""A folder's manifest: one JSON line for each result that was made or failed, appended as it is done.

The last line of a result counts. A line that was cut off by a crash is dropped when the manifest is opened again; while
it is open, no other process opens it.
"""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.reading import parse_json, read_bytes

NAME = "manifest.jsonl"
LARGEST = 2**30  # bytes, about a million results
RESULT = "result"
"""The key of a record that names its result, a file of the folder."""


class Manifest:
    """The records of a folder, by the name of their result.

    Attributes:
        path: of the file, which is there once something has been added.
        records: name of the result -> its last record, plain data.
    """

    def __init__(self, path: pathlib.Path, records: dict[str, dict[str, Any]]):
        """Take what `opened` has read."""
        self.path = path
        self.records = records

    def add(self, name: str, record: Mapping[str, Any]) -> None:
        """Append the record of a result: all of its line, or nothing.

        Raises:
            InputError: it cannot be written; the disk may be full.
        """
        record = {RESULT: _key(name), **record}
        line = (json.dumps(record) + "\n").encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    if file.write(line) != len(line):
                        raise OSError(28, os.strerror(28))  # ENOSPC: what was written is what there was room for
                except OSError:
                    file.truncate(before)
                    raise
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        self.records[record[RESULT]] = record

    def get(self, name: str) -> dict[str, Any] | None:
        """The last record of a result, or None."""
        return self.records.get(_key(name))


@contextlib.contextmanager
def opened(folder: pathlib.Path) -> Iterator[Manifest]:
    """The manifest of a folder that exists, which is locked until the block ends.

    Raises:
        InputError: another process has it open; it cannot be read; or a line of it is no record.
    """
    path = folder / NAME
    with _locked(folder):
        yield Manifest(path, _read(path))


def _read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    if not os.path.lexists(path):
        return {}
    data = read_bytes(path, LARGEST, "manifest")
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):  # a process was killed while it wrote
        try:
            os.truncate(path, len(whole))
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    records = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        where = f"{path}: line {number}"
        remedy = "rename the file to begin a new one"
        try:
            record = parse_json(line, where)
        except InputError as error:
            raise InputError(f"{error}; {remedy}") from None
        if not isinstance(record, dict) or not isinstance(record.get(RESULT), str):
            raise InputError(f"{where}: must be a record that names its {RESULT}; {remedy}")
        records[record[RESULT]] = record
    return records


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Hold a lock on the folder itself, which leaves no file behind; it goes with the process."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: cannot be opened ({error.strerror})") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another run is writing to it; wait for it, or name another folder") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def _key(name: str) -> str:
    """A file's name as text: what of it is not UTF-8 is escaped."""
    return name.encode("utf-8", "backslashreplace").decode()
