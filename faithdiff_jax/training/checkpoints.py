"""Checkpoints of a run: written while training goes on, whole or not at all, and restored onto any mesh.

FOLDER/<step>/    one Orbax checkpoint of the flat state {"trained/unet.conv_in.kernel": array, ...}, and the data's
                  position as JSON beside it

The state is stored by the names of its leaves, so that optax's types are no part of the format, and so that an export
finds parameters without knowing the optimiser. A checkpoint is written under another name and renamed when all of it is
there; the ones that the policy no longer keeps are removed after that.
"""

import contextlib
import logging
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from faithdiff_jax.errors import InputError
from faithdiff_jax.training.config import CheckpointConfig
from faithdiff_jax.weights.safetensors_format import Spec

# How much of a checkpoint is in memory at a time while it is read to be passed on.
GROUP_BYTES = 2**30
UNFINISHED = "*.orbax-checkpoint-tmp"
NAMED_AT_MOST = 5
# A slow disk is no failure: Orbax gives up after this long.
SAVE_SECONDS = 4 * 3600


class DamagedError(InputError):
    """A checkpoint that was written whole and cannot be read."""


class Checkpoints:
    """The checkpoints of the run that this process is part of; every process of the run calls every method.

    Args:
        folder: RUN_DIR/checkpoints, made where it is missing; what a save that was cut short left there is removed.
        config: when to save, and what to keep.

    Raises:
        InputError: a folder that cannot be written to.
    """

    def __init__(self, folder: pathlib.Path | str, config: CheckpointConfig):
        self.folder = pathlib.Path(folder).absolute()
        self._config = config
        self._open = contextlib.ExitStack()
        self._open.enter_context(_quiet())
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(config.latest)]
        kept += [] if config.keep_every is None else [policies.EveryNSteps(config.keep_every)]
        context = ocp.Context()
        context.array.saving.use_compression = False  # random mantissas shrink by 8 %, at four times the time
        context.asynchronous.timeout_secs = SAVE_SECONDS
        try:
            if jax.process_index() == 0:
                for path in self.folder.glob(UNFINISHED):
                    shutil.rmtree(path)
            self._orbax = ocp.training.Checkpointer(
                self.folder, context=context, preservation_policy=policies.AnyPreservationPolicy(kept)
            )
        except OSError as error:
            self._open.close()
            raise InputError(f"{self.folder}: cannot be written to ({error.strerror or error})") from None

    def due(self, step: int) -> bool:
        """Whether the policy asks for a checkpoint after `step` steps."""
        return step % self._config.every == 0

    def save(self, step: int, state: Any, data: Mapping[str, Any]) -> None:
        """Begin to save; returns once the arrays may be overwritten or donated. A step that is saved already is left.

        Args:
            step: how many steps the state has seen.
            state: a pytree of arrays.
            data: plain JSON values, the same in every process.

        Raises:
            InputError: this save, or the one before it, failed; earlier checkpoints are intact.
        """
        with self._saving():
            self._orbax.wait()
            if step in self.steps():
                return
            if not self.folder.is_dir():
                raise FileNotFoundError("the folder has vanished")
            self._orbax.save_checkpointables_async(
                step, {"state": _flat(state)}, force=True, custom_metadata={"data": dict(data)}
            )

    def wait(self) -> None:
        """Return once the last save is on disk.

        Raises:
            InputError: it failed; earlier checkpoints are intact.
        """
        with self._saving():
            self._orbax.wait()

    def steps(self) -> list[int]:
        """The steps that are saved, ascending; one that is being saved counts."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def latest_step(self) -> int | None:
        """The newest step that is saved, or None."""
        return max(self.steps(), default=None)

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Read a checkpoint, each array straight onto its devices.

        Args:
            step: one of `steps`.
            abstract_state: the state's pytree with a `jax.ShapeDtypeStruct` with a sharding for every array; the mesh
                need not be the one that saved.

        Returns:
            The state, and the `data` that was saved with it.

        Raises:
            InputError: no such checkpoint, one whose arrays are not those of the state (the first few are named), or
                a damaged one (the newest older one that is whole is named).
        """
        wanted = _flat(abstract_state)
        try:
            arrays, data = _load(self.folder, step, wanted)
        except DamagedError as error:
            older = (other for other in reversed(self.steps()) if other < step)
            whole = next((other for other in older if self._whole(other, wanted)), None)
            hint = (
                "no older one is whole" if whole is None else f"step {whole} is whole, remove {step} to go on from it"
            )
            raise InputError(f"{error}; {hint}") from None
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in wanted]), data

    def close(self) -> None:
        """Wait for the last save and end.

        Raises:
            InputError: that save failed; earlier checkpoints are intact.
        """
        with self._open, self._saving():
            self._orbax.close()

    def _whole(self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> bool:
        try:
            _load(self.folder, step, wanted)
        except InputError:
            return False
        return True

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """What a save raises, here or in the threads that write, is an InputError."""
        try:
            yield
        except Exception as error:
            with contextlib.suppress(Exception):
                self._orbax.reload()  # forget the step that failed
            intact = f"step {self.latest_step()} is intact" if self.steps() else "there is no earlier one"
            raise InputError(f"{self.folder}: a checkpoint cannot be written ({_reason(error)}); {intact}") from None


def saved_steps(folder: pathlib.Path | str) -> list[int]:
    """The steps that are saved in a folder, ascending; the run may be under way."""
    folder = pathlib.Path(folder)
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


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
    path = pathlib.Path(folder).absolute() / str(step)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in specs.items()}
    for group in _groups(names, sizes):
        # An ndarray asks for one; its numbers are of no account, so it is one number, repeated.
        wanted = {
            name: np.broadcast_to(np.empty((), dtype), shape) if name in group else ocp.PLACEHOLDER
            for name, (dtype, shape) in specs.items()
        }
        with _reading(path):
            loaded = ocp.load(path, wanted)
        for name in group:
            yield name, loaded.pop(name)


def _groups(names: Iterable[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Cut into runs of `GROUP_BYTES` at most, or of one larger array."""
    group: list[str] = []
    for name in names:
        if group and sum(sizes[other] for other in group) + sizes[name] > GROUP_BYTES:
            yield group
            group = []
        group.append(name)
    if group:
        yield group


def _load(
    folder: pathlib.Path, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Read and check one; errors as for `Checkpoints.restore`."""
    path = folder / str(step)
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
        data = (ocp.checkpointables_metadata(path).custom_metadata or {}).get("data")
        if not isinstance(data, dict):
            raise ValueError("the data's position is missing")
        return ocp.load(path, dict(wanted)), data


def _metadata(folder: pathlib.Path | str, step: int) -> dict[str, Any]:
    """Name -> what Orbax knows of the array."""
    path = pathlib.Path(folder).absolute() / str(step)
    if not path.is_dir():
        steps = ", ".join(map(str, saved_steps(folder))) or "none"
        raise InputError(f"{folder}: has no checkpoint of step {step} (there: {steps})")
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
    store = tensorstore.KvStore.open({"driver": "file", "path": f"{folder}/"}).result()
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
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found < size:
            raise ValueError(f"{folder.name}/{name} has {found} of {size} bytes")


def _flat(tree: Any) -> dict[str, Any]:
    """Name of each leaf -> leaf, in the order of `jax.tree.leaves`: "trained/unet.conv_in.kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _misfits(wanted: Mapping[str, Spec], found: Mapping[str, Spec]) -> list[str]:
    """Every array that is missing, unknown, or of another shape or dtype."""
    faults = [f"missing {name}" for name in wanted if name not in found]
    faults += [f"unknown {name}" for name in found if name not in wanted]
    faults += [
        f"{name} is {_said(found[name])}, wanted {_said(spec)}"
        for name, spec in wanted.items()
        if name in found and found[name] != spec
    ]
    return faults


def _said(spec: Spec) -> str:
    return f"{spec[0].name} {spec[1]}"


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    """What Orbax raises for a damaged checkpoint is an InputError here; what the devices raise is not."""
    try:
        with _quiet():
            yield
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:
        raise DamagedError(f"{path}: damaged ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    """The first cause's first line, or what the system's number in it stands for."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error) or type(error).__name__
    number = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(number[1])) if number else text.splitlines()[0][:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
