"""Large arrays on disk, written and read in pieces, so that memory holds a piece at a time."""

import os
import shutil
import tempfile
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped

from faithdiff_jax.errors import InputError


class Spill:
    """An array (H, W, C) in a temporary file without a name, which goes with the object.

    It is read and written by calls, not mapped, so that the process never owns more than the pieces in hand; the
    system keeps what it has memory for.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: npt.DTypeLike):
        """Make the file, in the system's folder for temporary files (TMPDIR).

        Raises:
            InputError: there is no room for it.
        """
        self.shape, self.dtype = shape, np.dtype(dtype)
        check_room(self.size)
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  closed with the object
        self._handle = file.fileno()
        self.close = weakref.finalize(self, file.close)

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return spilled_size(self.shape, self.dtype)

    def write(self, top: int, left: int, piece: Shaped[np.ndarray, "h w c"]) -> None:
        """Put a piece where its corner is; OSError if the disk is full."""
        if left == 0 and piece.shape[1] == self.shape[1]:
            piece = piece.reshape(1, -1, self.shape[2])
        for row, line in enumerate(np.ascontiguousarray(piece, self.dtype)):
            data, offset = memoryview(line).cast("B"), self._offset(top + row, left)
            while data:
                written = os.pwrite(self._handle, data, offset)
                data, offset = data[written:], offset + written

    def read(self, top: int, left: int, height: int, width: int) -> Shaped[np.ndarray, "{height} {width} c"]:
        """A piece of what has been written."""
        piece = np.empty((height, width, self.shape[2]), self.dtype)
        rows: Any = piece
        if left == 0 and width == self.shape[1]:
            rows = piece.reshape(1, -1, self.shape[2])
        for row, line in enumerate(rows):
            data, offset = memoryview(line).cast("B"), self._offset(top + row, left)
            while data:
                count = os.preadv(self._handle, [data], offset)
                if not count:
                    raise ValueError(f"rows {top} to {top + height} have not been written")
                data, offset = data[count:], offset + count
        return piece

    def _offset(self, row: int, column: int) -> int:
        return (row * self.shape[1] + column) * self.shape[2] * self.dtype.itemsize


def spilled_size(shape: tuple[int, int, int], dtype: npt.DTypeLike) -> int:
    """Bytes that a `Spill` takes on disk."""
    height, width, channels = shape
    return height * width * channels * np.dtype(dtype).itemsize


def check_room(size: int) -> None:
    """InputError if the folder for temporary files has not so many bytes left."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < size:
        needed = f"needs {size / 1e9:.1f} GB for the parts of a picture, {free / 1e9:.1f} GB are left"
        raise InputError(f"{folder}: {needed}; name another folder in the environment variable TMPDIR")
