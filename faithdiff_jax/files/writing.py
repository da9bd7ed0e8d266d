"""Output that appears complete under its name, or not at all."""

import contextlib
import os
import pathlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.places import is_remote, reached

_UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.tmp")


def refuse_existing(output: pathlib.Path) -> None:
    """InputError if there is something at `output` that would be lost; an empty folder is fine."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise InputError(f"{output}: exists already; remove it or give another --output")


@contextlib.contextmanager
def whole(output: pathlib.Path, size: int) -> Iterator[pathlib.Path]:
    """Yield a path beside `output` to write a file or folder to; it becomes `output` at the end.

    It is removed if anything fails. Folders above `output` are made.

    Raises:
        InputError: the disk has fewer than `size` bytes left, or cannot be written to.
    """
    with _appearing(output) as temporary:
        free = shutil.disk_usage(output.parent).free
        if free < size:
            raise InputError(f"{output}: needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left")
        yield temporary
        temporary.rename(output)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a path beside `path` to write a file to; at the end it takes the place of `path`, whatever was there.

    It is removed if anything fails, and what was there stays. Folders above `path` are made. For a remote `path` it
    lies on this machine, and is uploaded at the end.

    Raises:
        InputError: `path` cannot be written to.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            local = pathlib.Path(folder, "file")
            yield local
            with reached(path), local.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 2**24)
        return
    with _appearing(path) as temporary:
        yield temporary
        os.replace(temporary, path)


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Write `data` to `path` by `replacing`: what was there before, or all of the data."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: pathlib.Path, text: str) -> None:
    """Write `text` as UTF-8, line ends as they are, to `path` by `replacing`: what was there before, or all of it.

    Raises:
        InputError: `path` cannot be written to, or the text holds half of a surrogate pair (as Python spells file names
            that are not UTF-8).
    """
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: cannot hold {text[error.start : error.end]!r}, which is not Unicode text") from None
    write_bytes(path, data)


def remove_unfinished(folder: pathlib.Path) -> None:
    """Remove the files that processes which were killed had begun in a folder; nobody else may be writing to it."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _UNFINISHED.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                os.unlink(entry.path)


@contextlib.contextmanager
def _appearing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path beside `path` that is removed at the end if it is still there; OSError as an InputError of `path`."""
    # Hidden, without the suffix of a picture, so that no listing of the folder meets it; and short, whatever the name.
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({' '.join((error.strerror or str(error)).split())})") from None
    finally:
        with contextlib.suppress(OSError):
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)
