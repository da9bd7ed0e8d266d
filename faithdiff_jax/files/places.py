"""Paths of this machine and of Google Cloud Storage, by one name: `place` makes of a text what either is used with.

    runs/a -> pathlib.Path          gs://bucket/runs/a -> etils' epath.Path, which has the same methods

An object store has no folders, locks or appending, and renames by copying; but an object appears whole or not at all.
Remote paths need the extra `gcs`, whose clients find credentials, or a server that stands in, by themselves.
"""

import contextlib
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import cast

from faithdiff_jax.errors import InputError

REMOTE = "gs://"
CACHE = "~/.cache/faithdiff-jax"
SECONDS = 30.0
"""How long a bucket may take for its first answer."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is not one of this machine."""
    return "://" in os.fspath(path)


def place(path: str | os.PathLike[str]) -> pathlib.Path:
    """A path to work with; a remote one is an `epath.Path`, which takes the place of a `pathlib.Path`.

    Raises:
        InputError: a remote path of another kind than gs://BUCKET/NAME.
    """
    text = os.fspath(path)
    if not is_remote(text):
        return pathlib.Path(path)
    if not text.startswith(REMOTE) or not text.removeprefix(REMOTE).strip("/"):
        raise InputError(f"{text}: of remote paths only {REMOTE}BUCKET/NAME is supported")
    from etils import epath

    return cast(pathlib.Path, epath.Path(text))


def resolved(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path from the root on, links followed; a remote one is that already."""
    return place(path) if is_remote(path) else place(path).resolve()


@contextlib.contextmanager
def reached(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the clients of a remote path raise, exceptions of many libraries, is an InputError of the path here."""
    if not is_remote(path):
        yield
        return
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, or no such bucket for these credentials") from None
    except Exception as error:
        said = " ".join((str(error) or type(error).__name__).split())[:200]
        raise InputError(f"{path}: cannot be reached ({type(error).__name__}: {said})") from None


def require_reachable(path: str | os.PathLike[str]) -> None:
    """See that the bucket of a remote path is there: asking for what is in it would find nothing, without a word.

    Raises:
        InputError: it is not, or cannot be reached, or the packages that it takes are not installed.
    """
    if not is_remote(path):
        return
    bucket, _ = bucket_and_name(place(path))
    try:
        import gcsfs  # noqa: F401
        from google.api_core.exceptions import NotFound
        from google.cloud import storage
    except ImportError as error:
        raise InputError(f'{path}: needs the package {error.name}: pip install "faithdiff-jax[gcs]"') from None
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs the tracebacks of what it raises
    with reached(REMOTE + bucket):
        try:
            # Without the many tries, half a minute of them, of what comes later. Objects belong to no project.
            client = storage.Client(project="any")
            next(iter(client.list_blobs(bucket, max_results=1, timeout=SECONDS, retry=None)), None)
        except NotFound:
            raise FileNotFoundError from None


def file_size(path: pathlib.Path) -> int:
    """Bytes of a file, 0 where there is none."""
    if not path.is_file():
        return 0
    found = path.stat()
    return found.length if is_remote(path) else found.st_size  # type: ignore[attr-defined]


def bucket_and_name(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Take a remote path apart."""
    bucket, _, name = os.fspath(path).removeprefix(REMOTE).partition("/")
    return bucket, name


def remove_tree(folder: pathlib.Path) -> None:
    """Remove a folder and all that is in it.

    Raises:
        OSError: something cannot be removed.
    """
    import shutil

    if is_remote(folder):
        folder.rmtree()  # type: ignore[attr-defined]
    else:
        shutil.rmtree(folder)


def names_below(folder: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    """Yield (path within the folder, path) of all that is in a folder, at any depth, and no folder."""
    if not is_remote(folder):
        for path in folder.rglob("*"):
            if path.is_symlink() or not path.is_dir():
                yield path.relative_to(folder).as_posix(), path
        return
    root = os.fspath(folder).removeprefix(REMOTE)
    for parent, _, files in folder.walk():  # type: ignore[attr-defined]
        below = os.fspath(parent).removeprefix(REMOTE).removeprefix(root).strip("/")
        for name in files:
            within = f"{below}/{name}" if below else name
            yield within, folder / within
