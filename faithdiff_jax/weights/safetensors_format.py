"""The safetensors format, read and written one tensor at a time.

    8 bytes: length of the header | header: JSON, name -> dtype, shape, offsets | the tensors' bytes, without gaps

The usual library maps the whole file into memory, where every page that was read counts as ours until the file is
closed, and writes only what is held whole. Here a tensor is read or written, and gone.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from faithdiff_jax.errors import InputError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The library refuses longer headers too; a file of another kind states lengths of exabytes here.
LONGEST_HEADER = 100_000_000


class Place(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    """In bytes from the start of the file."""

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: pathlib.Path) -> dict[str, Place]:
    """Name -> place of every tensor of a file.

    Raises:
        InputError: the file cannot be read, is not safetensors, is shorter than its header says, or holds a dtype
            that is not in `DTYPES`.
    """
    try:
        actual = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if actual < 8 or length > LONGEST_HEADER:
                raise InputError(f"{path}: not a safetensors file")
            header = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if len(header) < length:
        raise InputError(f"{path}: cut short (its header has {length} bytes, the file {actual})")
    try:
        places = _places(json.loads(header), 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: not a safetensors file (its header cannot be read)") from None
    for name, place in places.items():
        if isinstance(place, str):
            raise InputError(f"{path}: {name} has dtype {place}, supported are {', '.join(DTYPES)}")
    end = max((place.start + place.size for place in places.values()), default=8 + length)
    if actual < end:
        raise InputError(f"{path}: cut short (its tensors need {end} bytes, the file has {actual})")
    return places


def _places(header: Mapping, data_start: int) -> dict:
    """The header's entries as places; one of an unsupported dtype as that dtype's name."""
    places: dict[str, Place | str] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            places[name] = str(entry["dtype"])
            continue
        place = Place(DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"]), data_start + start)
        if start < 0 or min(place.shape, default=0) < 0 or end - start != place.size:
            raise ValueError(name)
        places[name] = place
    return places


def read_tensor(path: pathlib.Path, place: Place) -> np.ndarray:
    """Read one tensor into an array of its own."""
    array = np.empty(place.shape, place.dtype)
    with path.open("rb") as file:
        file.seek(place.start)
        if file.readinto(array.reshape(-1).view(np.uint8).data) != place.size:
            raise InputError(f"{path}: cut short while it was read")
    return array


def write_tensors(
    path: pathlib.Path,
    specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Write a file whose header is known before its tensors are.

    Args:
        path: the file; it must not exist.
        specs: name -> dtype and shape. Wider dtypes should come first, or later tensors are not aligned.
        tensors: (name, array) in the order of `specs`.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in specs.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, array), (wanted, (dtype, shape)) in zip(tensors, specs.items(), strict=True):
            if (name, array.dtype, array.shape) != (wanted, dtype, shape):
                raise ValueError(f"{name} {array.dtype} {array.shape} came where {wanted} {dtype} {shape} was due")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
