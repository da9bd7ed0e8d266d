"""safetensors files, read by tensors or slices of them and written one tensor at a time.

    8 bytes: length of the header | header: JSON, name -> dtype, shape, offsets | the tensors' bytes, without gaps

The safetensors library checks the header, and what it would pass over (one name twice) is checked here. It writes only
tensors that are in memory all at once, and what it reads it maps, so that every page counts as memory of the process
until the file is closed, at a third of the speed of plain reads: bytes are read and written here.
"""

import concurrent.futures
import hashlib
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from jaxtyping import Shaped

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.reading import parse_json, printable, require_file

DTYPES: dict[str, np.dtype[Any]] = {
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

Spec = tuple[np.dtype[Any], tuple[int, ...]]
"""Dtype and shape."""
Tensor = Shaped[np.ndarray, "..."]
"""Of any shape and dtype."""
Arrays = Iterable[tuple[str, np.ndarray]]
"""(name, array), one by one; a stream, which no check may look into."""

# The library refuses longer headers too; a file of another kind states lengths of exabytes here.
LONGEST_HEADER = 100_000_000
LONGEST_SHOWN = 200
ALIGNMENT = 64  # bytes


class FileRecord(NamedTuple):
    """What identifies a file's contents."""

    bytes: int
    sha256: str
    """In hexadecimal digits."""


class Place(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    """In bytes from the start of the file."""

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def shown(name: object) -> str:
    """A name or value out of a file, for a message: control characters escaped, and the middle of a long one cut."""
    text = str(name)
    return printable(text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 40]}...{text[-40:]}")


def read_header(path: pathlib.Path) -> dict[str, Place]:
    """Name -> place of every tensor of a file.

    Raises:
        InputError: the file cannot be read, is not safetensors, is shorter or longer than its header says, holds one
            name twice, tensors that overlap or leave gaps, or a dtype that is not in `DTYPES`.
    """
    actual = require_file(path, "safetensors file")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if actual < 8 or length > LONGEST_HEADER:
                raise InputError(f"{path}: not a safetensors file")
            header = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if len(header) < length:
        raise InputError(f"{path}: cut short (its header has {length} bytes, the file {actual})")
    entries = _entries(path, header)
    end = 8 + length + max((offset for _, _, (_, offset) in entries.values()), default=0)
    if actual < end:
        raise InputError(f"{path}: cut short (its tensors need {end} bytes, the file has {actual})")
    for name, (dtype, _, _) in entries.items():
        if dtype not in DTYPES:
            raise InputError(f"{path}: {shown(name)} has dtype {dtype}, supported are {', '.join(DTYPES)}")
    try:
        # Types, signs, sizes against shapes, overlaps and gaps are checked by the library.
        with safetensors.safe_open(path, "np"):
            pass
    except Exception as error:  # it has one exception of its own, and passes others on
        reason = shown(str(error).splitlines()[0])
        raise InputError(f"{path}: not a safetensors file, or a damaged one ({reason})") from None
    return {
        name: Place(DTYPES[dtype], tuple(shape), 8 + length + start)
        for name, (dtype, shape, (start, _)) in entries.items()
    }


def _entries(path: pathlib.Path, header: bytes) -> dict[str, tuple[str, list[int], list[int]]]:
    """Name -> dtype, shape and offsets, as far as the header has them and once each."""
    entries = parse_json(header.rstrip(b" "), f"{path}: its header")
    try:
        entries.pop("__metadata__", None)
        kept = {name: (entry["dtype"], entry["shape"], entry["data_offsets"]) for name, entry in entries.items()}
        for dtype, shape, offsets in kept.values():
            _, _ = offsets
            if not isinstance(dtype, str) or not all(type(number) is int for number in (*shape, *offsets)):
                raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: not a safetensors file (its header is of another kind)") from None
    return kept


def read_tensor(path: pathlib.Path, place: Place) -> Tensor:
    """Read one tensor into an array of its own."""
    array = _empty(place)
    with path.open("rb") as file:
        file.seek(place.start)
        if file.readinto(array.reshape(-1).view(np.uint8).data) != place.size:
            raise InputError(f"{path}: cut short while it was read")
    return array


def _empty(place: Place) -> Tensor:
    """An array for a tensor, whose memory begins where JAX on CPU takes it as it is, without a copy."""
    memory = np.empty(place.size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + place.size].view(place.dtype).reshape(place.shape)


def read_slice(path: pathlib.Path, place: Place, index: tuple[slice, ...]) -> Tensor:
    """Read a part of one tensor into an array of its own: rows of it as bytes, anything else from a map of the file.

    Args:
        path: the file.
        place: the tensor's place in it.
        index: a slice for each axis, of step 1.
    """
    ranges = [axis.indices(length) for axis, length in zip(index, place.shape, strict=True)]
    if all(stop - start == length for (start, stop, _), length in zip(ranges[1:], place.shape[1:], strict=True)):
        start, stop = ranges[0][:2] if ranges else (0, 0)
        row = math.prod(place.shape[1:]) * place.dtype.itemsize
        shape = (stop - start, *place.shape[1:]) if ranges else ()
        return read_tensor(path, Place(place.dtype, shape, place.start + start * row))
    mapped = np.memmap(path, np.uint8, "r", offset=place.start, shape=(place.size,))
    return np.array(mapped.view(place.dtype).reshape(place.shape)[index])


def write_tensors(path: pathlib.Path, specs: Mapping[str, Spec], tensors: Arrays) -> FileRecord:
    """Write a file whose header is known before its tensors are.

    Args:
        path: the file; it must not exist.
        specs: name -> dtype and shape. Wider dtypes should come first, or later tensors are not aligned.
        tensors: (name, array) in the order of `specs`.

    Returns:
        The file's size and SHA-256.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in specs.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    total = hashlib.sha256()
    # Hashing takes as long as writing: the two go on side by side.
    with path.open("xb") as file, concurrent.futures.ThreadPoolExecutor(1) as hashing:

        def write(data: Any) -> None:
            hashed = hashing.submit(total.update, data)
            file.write(data)
            hashed.result()

        write(len(text).to_bytes(8, "little") + text)
        for (name, array), (wanted, (dtype, shape)) in zip(tensors, specs.items(), strict=True):
            if (name, array.dtype, array.shape) != (wanted, dtype, shape):
                raise ValueError(f"{name} {array.dtype} {array.shape} came where {wanted} {dtype} {shape} was due")
            write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return FileRecord(8 + len(text) + end, total.hexdigest())


def record(path: pathlib.Path) -> FileRecord:
    """The size and SHA-256 of a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def is_finite(array: Tensor) -> bool:
    """Whether no number of a floating-point array is infinite or NaN. Fast for float32, float16 and bfloat16."""
    mask = _EXPONENTS.get(array.dtype)
    if mask is None:
        return bool(np.isfinite(array).all())
    # The exponent's bits are all set in infinities and NaN, and in nothing else.
    bits = np.ascontiguousarray(array).reshape(-1).view(mask.dtype)
    return all((bits[i : i + _BLOCK] & mask).max() != mask for i in range(0, bits.size, _BLOCK))


_BLOCK = 2**16  # stays in the processor's cache
_EXPONENTS: dict[np.dtype[Any], Any] = {
    np.dtype(np.float32): np.uint32(0x7F800000),
    np.dtype(np.float16): np.uint16(0x7C00),
    np.dtype(ml_dtypes.bfloat16): np.uint16(0x7F80),
}
