"""Output that appears whole under its name, or not at all."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from faithdiff_jax.errors import InputError


def refuse_existing(output: pathlib.Path) -> None:
    """InputError if there is something at `output` that would be lost; an empty folder is fine."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise InputError(f"{output}: exists already; remove it or give another --output")


@contextlib.contextmanager
def whole(output: pathlib.Path, size: int) -> Iterator[pathlib.Path]:
    """Give a path beside `output` to write to; it becomes `output` at the end, and is removed if anything fails.

    Raises:
        InputError: the disk has fewer than `size` bytes left, or cannot be written to.
    """
    target = output.parent / f".{output.name}.{os.getpid()}.partial"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
        if free < size:
            raise InputError(f"{output}: needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left")
        yield target
        target.rename(output)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror or error})") from None
    finally:
        if target.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                target.unlink(missing_ok=True)
