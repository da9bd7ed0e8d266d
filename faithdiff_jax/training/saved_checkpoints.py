"""Checkpoints on disk: which steps a folder holds, what is in them, and whether they still are what was written.

A checkpoint is compared with its checksums (see `checksums`) before anything is taken from it.
"""

import contextlib
import logging
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import tensorstore
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.places import bucket_and_name, file_size, is_remote, place, reached, resolved
from faithdiff_jax.training import checksums
from faithdiff_jax.weights.safetensors_format import Spec
from faithdiff_jax.weights.upgrade import groups

log = logging.getLogger("faithdiff_jax")

# How much of a checkpoint is in memory at a time while it is read to be passed on.
GROUP_BYTES = 2**30
UNFINISHED = "*.orbax-checkpoint-tmp"
NAMED_AT_MOST = 5

T = TypeVar("T")


class DamagedError(InputError):
    """A checkpoint that was written whole and is no longer what was written."""


def saved_steps(folder: pathlib.Path | str) -> list[int]:
    """The steps that are saved in a folder, ascending; the run may be under way."""
    return sorted(int(path.name) for path in _steps(place(folder)) if _is_committed(path))


def unfinished(folder: pathlib.Path) -> list[pathlib.Path]:
    """What saves that were cut short have left."""
    if is_remote(folder):
        return [path for path in _steps(folder) if not _is_committed(path)]
    return list(folder.glob(UNFINISHED))


def _steps(folder: pathlib.Path) -> list[pathlib.Path]:
    with reached(folder):
        found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return [path for path in found if path.name.isascii() and path.name.isdecimal()]


def _is_committed(path: pathlib.Path) -> bool:
    return not is_remote(path) or (path / checksums.COMMITTED).is_file()


def verify(folder: pathlib.Path | str, step: int) -> None:
    """Compare every file of a checkpoint with its checksum; with several processes, each compares its share.

    One that an earlier version wrote has no checksums: a warning says so, and no more than its sizes are checked.

    Raises:
        InputError: no such checkpoint, or a damaged one (the file, and the newest older one that is whole, are named).
    """
    refuse_damaged(place(folder), step, _verify)


def saved_specs(folder: pathlib.Path | str, step: int) -> dict[str, Spec]:
    """Name -> dtype and shape of every array of a checkpoint.

    Raises:
        InputError: no such checkpoint, or a damaged one.
    """
    return {name: (np.dtype(leaf.dtype), tuple(leaf.shape)) for name, leaf in _metadata(folder, step).items()}


def load_saved(folder: pathlib.Path | str, step: int, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, array) of a checkpoint, in the order of `names`, with `GROUP_BYTES` (or one) in memory at most.

    Raises:
        InputError: no such checkpoint, or a damaged one.
    """
    specs = saved_specs(folder, step)
    path = resolved(folder) / str(step)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in specs.items()}
    for group in groups(names, sizes.__getitem__, GROUP_BYTES):
        # An ndarray asks for one; its values do not matter, so it is one value, repeated.
        wanted = {
            name: np.broadcast_to(np.empty((), dtype), shape) if name in group else ocp.PLACEHOLDER
            for name, (dtype, shape) in specs.items()
        }
        with _reading(path):
            loaded = ocp.load(path, wanted)
        for name in group:
            yield name, loaded.pop(name)


def refuse_damaged(folder: pathlib.Path, step: int, read: Callable[[pathlib.Path, int], T]) -> T:
    """`read(folder, step)`; if the checkpoint is damaged, the message names the newest older one that is whole."""
    try:
        return read(folder, step)
    except DamagedError as error:
        older = (other for other in reversed(saved_steps(folder)) if other < step)
        whole = next((other for other in older if _is_whole(folder, other, read)), None)
        hint = "no older one is whole" if whole is None else f"step {whole} is whole, remove {step} to resume from it"
        raise InputError(f"{error}; {hint}") from None


def _is_whole(folder: pathlib.Path, step: int, read: Callable[[pathlib.Path, int], object]) -> bool:
    try:
        _verify(folder, step)
        read(folder, step)
    except InputError:
        return False
    return True


def metadata_of(folder: pathlib.Path, step: int) -> dict[str, Any]:
    """What was saved beside the state: the data's position, and whether there are checksums.

    Raises:
        InputError: no such checkpoint, or a damaged one.
    """
    path = resolved(folder) / str(step)
    if not path.is_dir():
        steps = ", ".join(map(str, saved_steps(folder))) or "none"
        raise InputError(f"{folder}: has no checkpoint of step {step} (there: {steps})")
    with _reading(path):
        try:
            metadata = ocp.checkpointables_metadata(path).custom_metadata
        except Exception as error:
            raise ValueError(f"{checksums.METADATA}: {reason(error)}") from None
        if not isinstance(metadata, dict) or not isinstance(metadata.get("data"), dict):
            raise ValueError(f"{checksums.METADATA}: the data's position is missing")
        return metadata


def _verify(folder: pathlib.Path, step: int) -> None:
    path = resolved(folder) / str(step)
    if not (path / checksums.MANIFEST).is_file():
        if "checksums" in metadata_of(folder, step):
            raise DamagedError(f"{path}: damaged ({checksums.MANIFEST} is missing)")
        if jax.process_index() == 0:
            log.warning("%s: an earlier version wrote it without checksums; a changed byte would go unnoticed", path)
        return
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the main process has completed the checksums")
    fault = _first_fault(path)
    if jax.process_count() > 1:
        faults = multihost_utils.process_allgather(np.frombuffer((fault or "").encode().ljust(1024)[:1024], np.uint8))
        fault = next((text for row in faults if (text := bytes(row).decode(errors="replace").strip())), None)
    if fault is not None:
        raise DamagedError(f"{path}: damaged ({fault})")


def _first_fault(path: pathlib.Path) -> str | None:
    """What is wrong with this process's share of a checkpoint's files."""
    try:
        sums = checksums.read_checksums(path)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{checksums.MANIFEST}: {error.strerror or error}"
    changed = checksums.first_changed(path, sums, sorted(sums)[jax.process_index() :: jax.process_count()])
    return None if changed is None else f"{changed} is not what was written"


def load_state(
    folder: pathlib.Path, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Check and read a checkpoint; errors as for `Checkpoints.restore`.

    Args:
        folder: the folder of the checkpoints.
        step: which one.
        wanted: name -> shape, dtype and sharding of every array of the state.

    Returns:
        Name -> array, and the data's position that was saved with them.
    """
    path = folder / str(step)
    _verify(folder, step)
    data = metadata_of(folder, step)["data"]
    specs = {name: (np.dtype(leaf.dtype), tuple(leaf.shape)) for name, leaf in wanted.items()}
    faults = _misfits(specs, saved_specs(folder, step))
    if faults:
        more = f" and {len(faults) - NAMED_AT_MOST} more" * (len(faults) > NAMED_AT_MOST)
        raise InputError(f"{path}: does not fit this configuration: {'; '.join(faults[:NAMED_AT_MOST])}{more}")
    # Orbax fails on an array that reaches its limit.
    largest = max(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())
    context = ocp.Context()
    context.memory.read_concurrent_bytes = max(4 * GROUP_BYTES, 2 * largest)
    with context, _reading(path):
        return ocp.load(path, dict(wanted)), data


def _metadata(folder: pathlib.Path | str, step: int) -> dict[str, Any]:
    """Name -> what Orbax knows of the array."""
    path = resolved(folder) / str(step)
    metadata_of(place(folder), step)
    with _reading(path):
        _check_files(path / "state")
        metadata = ocp.metadata(path).metadata
        if not isinstance(metadata, dict) or not metadata:
            raise ValueError("its metadata is missing")
        return metadata


def _check_files(folder: pathlib.Path) -> None:
    """See that every byte that the index points to is there.

    Where it is not, many arrays fail to load at once, and those after the first report it later, from nowhere.
    """
    spec = {"driver": "file", "path": f"{folder}/"}
    if is_remote(folder):
        bucket, name = bucket_and_name(folder)
        spec = {"driver": "gcs", "bucket": bucket, "path": f"{name}/"}
    store = tensorstore.KvStore.open(spec).result()
    manifest = tensorstore.ocdbt.dump(store).result()
    if not manifest or not manifest["versions"]:
        raise ValueError("its index is missing")
    nodes, sizes = [manifest["versions"][-1]["root"]["location"]], dict[str, int]()
    while nodes:
        for entry in tensorstore.ocdbt.dump(store, nodes.pop()).result()["entries"]:
            if "location" in entry:
                nodes.append(entry["location"])
            elif "indirect_value" in entry:  # value:FOLDER/:FILE:OFFSET:LENGTH
                _, *names, offset, length = entry["indirect_value"].split(":")
                name = "".join(names)
                sizes[name] = max(sizes.get(name, 0), int(offset) + int(length))
    for name, size in sizes.items():
        found = file_size(folder / name)
        if found < size:
            raise ValueError(f"{folder.name}/{name} has {found} of {size} bytes")


def _misfits(wanted: Mapping[str, Spec], found: Mapping[str, Spec]) -> list[str]:
    """Every array that is missing, unknown, or of another shape or dtype."""
    faults = [f"missing {name}" for name in wanted if name not in found]
    faults += [f"unknown {name}" for name in found if name not in wanted]
    faults += [
        f"{name} is {_described(found[name])}, wanted {_described(spec)}"
        for name, spec in wanted.items()
        if name in found and found[name] != spec
    ]
    return faults


def _described(spec: Spec) -> str:
    return f"{spec[0].name} {spec[1]}"


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    """What Orbax raises for a damaged checkpoint is an InputError here; what the devices raise is not."""
    try:
        with quiet():
            yield
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:
        raise DamagedError(f"{path}: damaged ({reason(error)})") from None


def reason(error: BaseException) -> str:
    """The first cause's first line, or what the system's number in it stands for."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error) or type(error).__name__
    number = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(number[1])) if number else text.splitlines()[0][:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Orbax reports on each of its steps, from threads too, and logs beside what it raises; others may log."""

    def from_others(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    loggers = (logging.getLogger("absl"), logging.getLogger())
    for logger in loggers:
        logger.addFilter(from_others)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(from_others)
