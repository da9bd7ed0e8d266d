"""The files of a directory whose config.yaml lists them: how they are written, and seen to be as they were.

parts -> write_parts -> files, size and SHA-256 of each -> config.yaml
config.yaml -> read_config, parse_record -> size_faults, verify
"""

import functools
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from faithdiff_jax.config import load_yaml
from faithdiff_jax.errors import InputError
from faithdiff_jax.models.parts import Params, unflatten
from faithdiff_jax.weights import safetensors_format
from faithdiff_jax.weights.keymap import compare
from faithdiff_jax.weights.safetensors_format import Arrays, FileRecord, Place, Spec, Tensor, shown

CONFIG = "config.yaml"
NAMED_AT_MOST = 20

Index = tuple[slice, ...]
"""A slice for each axis."""

Finish = Callable[[str, jax.Array], Any]
"""(dotted path, parameter) -> what takes its place."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Contents(NamedTuple):
    """What a part's file is to hold."""

    specs: Mapping[str, Spec]
    """Dotted path -> dtype and shape."""
    arrays: Arrays
    """(dotted path, array) in the order of `specs`; one is asked for when the one before is written."""

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor]) -> "Contents":
        """Arrays in memory."""
        return cls({path: (array.dtype, array.shape) for path, array in arrays.items()}, arrays.items())

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(Place(dtype, shape, 0).size for dtype, shape in self.specs.values())


def file_name(part: str) -> str:
    """The file of a part."""
    return f"{part}.safetensors"


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Read a model directory's config.yaml.

    Raises:
        InputError: there is no such directory, it has no config.yaml, or that is not a YAML mapping.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model directory (faithdiff convert makes one)")
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: not a model directory, it has no {CONFIG} (faithdiff convert makes one)")
    return load_yaml(folder / CONFIG)


def refuse_unknown_keys(data: Mapping[str, Any], known: tuple[str, ...], source: str) -> None:
    """InputError that names what of config.yaml this version does not know."""
    unknown = sorted(shown(str(key)) for key in data if key not in known)
    if unknown:
        raise InputError(f"{source}: unknown key {', '.join(unknown)} (known there: {', '.join(known)})")


def section(data: Mapping[str, Any], key: str, source: str, *, optional: bool = False) -> Mapping[str, Any]:
    """A mapping in config.yaml; InputError if it is of another kind, or missing and not `optional`."""
    value = data.get(key, {} if optional else None)
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{source}: {key} is {shown(repr(value))}: must be a mapping of names to values")
    return value


def parse_record(name: str, entry: Any, source: str) -> FileRecord:
    """What config.yaml says of one file; InputError if that is not its size and checksum."""
    if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
        raise InputError(f"{source}: files.{shown(name)} must have bytes and sha256")
    size, checksum = entry["bytes"], entry["sha256"]
    if type(size) is not int or size < 0 or not isinstance(checksum, str) or not _SHA256.fullmatch(checksum):
        raise InputError(f"{source}: files.{shown(name)} must have bytes, 0 or more, and 64 hexadecimal digits")
    return FileRecord(size, checksum)


def size_faults(folder: pathlib.Path, files: Mapping[str, FileRecord]) -> list[str]:
    """One phrase for each file that is missing or of another size: a copy cut short, or a file left out."""
    faults = []
    for name, wanted in files.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found is None:
            faults.append(f"has no {name}")
        elif found != wanted.bytes:
            faults.append(f"{name} has {found} of {wanted.bytes} bytes")
    return faults


def verify(folder: pathlib.Path, files: Mapping[str, FileRecord]) -> None:
    """Compare the checksum of every file.

    Raises:
        InputError: files that were changed or are damaged, all of them named.
    """
    changed = [name for name, wanted in files.items() if safetensors_format.record(folder / name) != wanted]
    if changed:
        raise InputError(f"{folder}: {', '.join(changed)} changed or damaged: the checksum is not the one in {CONFIG}")


def write_parts(
    target: pathlib.Path, parts: Mapping[str, Contents], *, output: pathlib.Path, allow_nonfinite: bool
) -> dict[str, FileRecord]:
    """Write the file of each part.

    Args:
        target: the folder to write to, which is there and becomes `output`.
        parts: part name -> what it holds.
        output: the folder's name, for messages.
        allow_nonfinite: whether parameters may be NaN or infinite.

    Returns:
        File name -> its size and SHA-256.

    Raises:
        InputError: parameters that are NaN or infinite, by name.
    """
    nonfinite: list[str] = []
    files = {}
    for part, contents in parts.items():
        arrays = contents.arrays if allow_nonfinite else _noting(contents.arrays, part, nonfinite)
        file = target / file_name(part)
        files[file.name] = safetensors_format.write_tensors(file, contents.specs, arrays)
    if nonfinite:
        more = f" and {len(nonfinite) - NAMED_AT_MOST} more" * (len(nonfinite) > NAMED_AT_MOST)
        raise InputError(
            f"{output}: not written, NaN or infinite are {', '.join(nonfinite[:NAMED_AT_MOST])}{more} "
            "(--allow-nonfinite writes them anyway)"
        )
    return files


def load_part(
    file: pathlib.Path,
    places: Mapping[str, Place],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Any = None,
    sharding: jax.sharding.Sharding | Mapping[str, jax.sharding.Sharding] | None = None,
    finish: Finish | None = None,
) -> Params:
    """Read the parameters of one part onto their devices; of each only what this process's devices hold, once.

    Args:
        file: the part's file.
        places: its header.
        shapes: dotted path -> shape of every parameter of the architecture.
        dtype: the parameters' dtype, cast as they are read; None for the stored ones.
        sharding: where to put them: one sharding for all, or one for each dotted path; None for the first local
            device.
        finish: what to make of each parameter as soon as it is there; None for itself.

    Returns:
        The nested dictionary that `nnx.update` and `nnx.merge` take in place of the module's state.

    Raises:
        InputError: the arrays are not those of the architecture (all faults at once).
    """
    faults = compare(shapes, {path: place.shape for path, place in places.items()})
    if faults:
        raise InputError(f"{file}: does not fit {CONFIG}: {'; '.join(faults)}")
    at = sharding if sharding is not None else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    loaded = {}
    for path in shapes:
        place = places[path]
        target = at[path] if isinstance(at, Mapping) else at
        read = _reader(file, place, place.dtype if dtype is None else np.dtype(dtype))
        array = jax.make_array_from_callback(place.shape, target, read)
        loaded[path] = array if finish is None else finish(path, array)
    return unflatten(loaded)


def _noting(arrays: Arrays, part: str, nonfinite: list[str]) -> Arrays:
    """Pass arrays on, and note the names of those with NaN or infinite numbers."""
    for path, array in arrays:
        if not safetensors_format.is_finite(array):
            nonfinite.append(f"{part}.{path}")
        yield path, array


def _reader(file: pathlib.Path, place: Place, dtype: np.dtype[Any]) -> Callable[[Index | None], Tensor]:
    """A function that reads slices of a tensor in another dtype, each once: devices may hold the same one."""

    @functools.cache
    def read(ranges: tuple[tuple[int, int], ...]) -> Tensor:
        index = tuple(slice(start, stop) for start, stop in ranges)
        return safetensors_format.read_slice(file, place, index).astype(dtype, copy=False)

    def read_index(index: Index | None) -> Tensor:
        index = index or (slice(None),) * len(place.shape)
        return read(tuple(axis.indices(length)[:2] for axis, length in zip(index, place.shape, strict=True)))

    return read_index
