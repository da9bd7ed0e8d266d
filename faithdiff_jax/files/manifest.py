"""A folder's manifest: one JSON line for each result that was made or failed, appended as it is done.

The last line of a result counts. A line that was cut off by a crash is dropped before another one is added. While a
manifest is open no other process opens it, unless all of them share it: then each claims a result before it makes it.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from faithdiff_jax.errors import InputError
from faithdiff_jax.files import claims as claims_
from faithdiff_jax.files.reading import parse_json, require_file

NAME = "manifest.jsonl"
LARGEST = 2**30  # bytes, about a million results
RESULT = "result"
"""The key of a record that names its result, a file of the folder."""


class Manifest:
    """The records of a folder, by the name of their result; threads may use it at once.

    Attributes:
        path: of the file, which is there once something has been added.
        records: name of the result -> its last record, plain data.
        elsewhere: names of results that other processes have added since it was opened.
    """

    def __init__(self, path: pathlib.Path, claims: claims_.Claims | None):
        """Read what is there; `claims` if the manifest is shared."""
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        self.elsewhere: set[str] = set()
        self._claims = claims
        self._read_to = self._lines = 0
        self._lock = threading.Lock()
        self.refresh()
        self.elsewhere.clear()

    @property
    def shared(self) -> bool:
        """Whether other processes may have it open too."""
        return self._claims is not None

    def add(self, name: str, record: Mapping[str, Any]) -> None:
        """Append the record of a result: all of its line, or nothing.

        Raises:
            InputError: it cannot be written; the disk may be full.
        """
        record = {RESULT: _key(name), **record}
        line = (json.dumps(record) + "\n").encode()
        try:
            with self._turn(), self.path.open("a+b", buffering=0) as file:
                self._take_in(file)
                try:
                    if file.write(line) != len(line):
                        raise OSError(28, os.strerror(28))  # ENOSPC: what was written is what there was room for
                except OSError:
                    file.truncate(self._read_to)
                    raise
                self._read_to += len(line)
                self._lines += 1
                self.records[record[RESULT]] = record
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror or error})") from error

    def get(self, name: str) -> dict[str, Any] | None:
        """The last record of a result, or None."""
        return self.records.get(_key(name))

    def claim(self, name: str) -> bool:
        """Take a result in hand, with what was added meanwhile; False if another process has it.

        Raises:
            InputError: see `refresh`.
        """
        if self._claims is None:
            return True
        if not self._claims.take(_key(name)):
            return False
        self.refresh()
        return True

    def release(self, name: str) -> None:
        """Give a result back, once it has its record."""
        if self._claims is not None:
            self._claims.release(_key(name))

    def done_elsewhere(self, name: str) -> bool:
        """Whether another process has added a record of a result since the manifest was opened."""
        return _key(name) in self.elsewhere

    def refresh(self) -> None:
        """Read what was added since.

        Raises:
            InputError: it cannot be read, or a line of it is no record.
        """
        if not os.path.lexists(self.path):
            return
        if require_file(self.path, "manifest") > LARGEST:
            raise InputError(f"{self.path}: too large for a manifest, at most {LARGEST:,} bytes are read")
        try:
            with self._turn(), self.path.open("rb", buffering=0) as file:
                self._take_in(file)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from None

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Alone, among the threads of this process and of the others that share the manifest."""
        with self._lock, contextlib.nullcontext() if self._claims is None else self._claims.turn():
            yield

    def _take_in(self, file: BinaryIO) -> None:
        """Read on to the end of the last whole line; what follows it, a process was killed while it wrote."""
        self._read_to = min(self._read_to, file.seek(0, os.SEEK_END))  # somebody may have taken the file away
        file.seek(self._read_to)
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self.path, self._read_to + len(whole))
        for line in whole.split(b"\n")[:-1]:
            record = _record(line, f"{self.path}: line {self._lines + 1}")
            self._lines += 1
            self.records[record[RESULT]] = record
            self.elsewhere.add(record[RESULT])
        self._read_to += len(whole)


@contextlib.contextmanager
def opened(folder: pathlib.Path, *, shared: bool = False) -> Iterator[Manifest]:
    """The manifest of a folder that exists, which is locked until the block ends, but for others that share it.

    Raises:
        InputError: another process has it open; it cannot be read; or a line of it is no record.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_locked(folder, shared))
        claims = stack.enter_context(claims_.opened(folder)) if shared else None
        yield Manifest(folder / NAME, claims)


def _record(line: bytes, where: str) -> dict[str, Any]:
    """The record of a line; InputError for anything else."""
    remedy = "rename the file to begin a new one"
    try:
        record = parse_json(line, where)
    except InputError as error:
        raise InputError(f"{error}; {remedy}") from None
    if not isinstance(record, dict) or not isinstance(record.get(RESULT), str):
        raise InputError(f"{where}: must be a record that names its {RESULT}; {remedy}")
    return record


@contextlib.contextmanager
def _locked(folder: pathlib.Path, shared: bool) -> Iterator[None]:
    """Hold a lock on the folder itself, which leaves no file behind; it goes with the process."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: cannot be opened ({error.strerror})") from None
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "wait for it, name another folder, or give --shared to both"
            raise InputError(f"{folder}: another run is writing to it; {remedy}") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def _key(name: str) -> str:
    """A file's name as text: what of it is not UTF-8 is escaped."""
    return name.encode("utf-8", "backslashreplace").decode()
