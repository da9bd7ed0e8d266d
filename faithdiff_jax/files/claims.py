"""What of a folder each of several processes has in hand, so that no two do the same.

A claim is a lock on one byte of a hidden file, at a place that follows from the name of what is claimed. The system
takes it back when the process ends, however it ends: there is no time after which a process counts as dead. The last
process to leave removes the file.
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
from collections.abc import Iterator

from faithdiff_jax.errors import InputError

NAME = ".claims"
_TURN = 0
"""The byte whose lock is the right to write what all processes write to."""
_PRESENT = 2**62 + 1
"""The byte that all processes share a lock on as long as they are there; names have those between."""


class Claims:
    """The claims of this process, whose threads share them; one of them at a time takes its turn."""

    def __init__(self, folder: pathlib.Path, handle: int):
        """Take what `opened` has opened."""
        self._folder = folder
        self._handle = handle

    def take(self, name: str) -> bool:
        """Claim a name; False if another process has it, True also if it is ours already.

        Raises:
            InputError: the file system has no locks.
        """
        return self._locked(_place(name), wait=False)

    def release(self, name: str) -> None:
        """Give a name back."""
        fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, _place(name))

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other process is in such a block; not to be nested."""
        self._locked(_TURN, wait=True)
        try:
            yield
        finally:
            fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, _TURN)

    def _locked(self, place: int, *, wait: bool) -> bool:
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        except (BlockingIOError, PermissionError):  # which of the two is up to the system
            return False
        except OSError as error:
            why = f"its file system has no locks ({error.strerror})"
            raise InputError(f"{self._folder}: {why}, one process at a time can write to it") from None
        return True


@contextlib.contextmanager
def opened(folder: pathlib.Path) -> Iterator[Claims]:
    """The claims on what is in a folder, given back when the block ends.

    Raises:
        InputError: the file cannot be opened.
    """
    handle = _present(folder / NAME)
    try:
        yield Claims(folder, handle)
    finally:
        with contextlib.suppress(OSError):  # others are there, or there are no locks
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _PRESENT)
            os.unlink(folder / NAME)
        os.close(handle)


def _present(path: pathlib.Path) -> int:
    """Open the file, in which this process is then known to be there."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise InputError(f"{path}: cannot be opened ({error.strerror})") from None
        with contextlib.suppress(OSError):  # told when something is claimed
            fcntl.lockf(handle, fcntl.LOCK_SH, 1, _PRESENT)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # the last process that was there has just removed it


def _place(name: str) -> int:
    """A byte from 1 to 2^62: two of a million names share one once in ten million such runs, and then wait."""
    return 1 + (int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 2)
