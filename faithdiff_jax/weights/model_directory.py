"""Model directories: an architecture and its parameters, as `convert_weights.py` writes and `FaithDiff.load` reads.

MODEL_DIR/config.yaml        format, model (FaithDiffConfig), sizes, checksums of small models, provenance
MODEL_DIR/params/<part>/     one Orbax checkpoint: {dotted path: array}, in the published dtype
MODEL_DIR/tokenizer*/        as published, one for each text encoder
"""

import contextlib
import hashlib
import logging
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import yaml
from orbax.checkpoint import v1 as ocp

from faithdiff_jax.config import from_dict, load_yaml, to_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import Params, numbered, part_names, part_shapes, unflatten
from faithdiff_jax.weights.keymap import compare

FORMAT = 1
CONFIG = "config.yaml"
KEYS = ("format", "model", "sizes", "checksums", "provenance")
# Models up to this size have checksums, which are compared whenever their configuration is read.
CHECKED_BYTES = 2**28

# How much of a part is in memory at a time while it is written, or read to be passed on.
GROUP_BYTES = 2**30

Spec = tuple[np.dtype, tuple[int, ...]]


def write_config(model_dir: pathlib.Path, config: FaithDiffConfig, provenance: Mapping[str, Any]) -> None:
    """Write `config.yaml` when all parts and tokenizers are saved; `provenance` is plain data, for people to read."""
    for marker in model_dir.glob("params/*/commit_success.txt"):
        marker.unlink()  # Orbax's note of the folder that it wrote in, which is another one by now; nothing reads it
    sizes = {part: _size(_folder(model_dir, part)) for part in part_names(config)}
    data = {"format": FORMAT, "model": to_dict(config), "sizes": sizes}
    if sum(sizes.values()) <= CHECKED_BYTES:
        folders = [name for name in _folders(config) if (model_dir / name).is_dir()]
        data["checksums"] = {name: _checksum(model_dir / name) for name in folders}
    data["provenance"] = dict(provenance)
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    (model_dir / CONFIG).write_text(text, encoding="utf-8")


def read_config(model_dir: pathlib.Path | str) -> FaithDiffConfig:
    """Read a model directory's architecture, and see that its parts are there, each with all its bytes.

    Raises:
        InputError: not a model directory, or one that is incomplete, of another format or with an unknown key.
    """
    model_dir = pathlib.Path(model_dir)
    if not model_dir.is_dir():
        raise InputError(f"{model_dir}: no such model directory (convert_weights.py makes one)")
    path = model_dir / CONFIG
    if not path.is_file():
        raise InputError(f"{model_dir}: not a model directory, it has no {CONFIG} (convert_weights.py makes one)")
    data = load_yaml(path)
    unknown = sorted(str(key) for key in data if key not in KEYS)
    if unknown:
        raise InputError(f"{path}: unknown key {', '.join(unknown)} (known there: {', '.join(KEYS)})")
    if data.get("format") != FORMAT:
        raise InputError(f"{path}: format is {data.get('format')!r}, this version reads format {FORMAT}")
    if not isinstance(data.get("model"), dict):
        raise InputError(f"{path}: has no model section")
    config = from_dict(FaithDiffConfig, data["model"], str(path))
    missing = [name for name in _folders(config) if not (model_dir / name).is_dir()]
    if missing:
        raise InputError(f"{model_dir}: incomplete, it has no {', '.join(missing)}")
    # A copy that was cut short is told here, in a line: Orbax tells it in pages.
    sizes = data.get("sizes")
    for part, size in sizes.items() if isinstance(sizes, dict) else ():
        found = _size(_folder(model_dir, part))
        if found < size:
            raise InputError(f"{model_dir}: incomplete, params/{part} has {found} of {size} bytes")
    checksums = data.get("checksums")
    for name, checksum in checksums.items() if isinstance(checksums, dict) else ():
        if _checksum(model_dir / name) != checksum:
            raise InputError(f"{model_dir}: {name} was changed or is damaged: its checksum is not that of {CONFIG}")
    return config


def save_part(model_dir: pathlib.Path, part: str, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write one part; of the arrays no more than `GROUP_BYTES` (or one) are held at a time.

    Args:
        model_dir: the model directory.
        part: a name of `part_names`; it must not have been written before.
        arrays: (dotted path, array), one by one.
    """
    target = (model_dir / "params" / part).absolute()
    context = ocp.Context()
    context.array.saving.use_compression = False  # random mantissas shrink by 8 %, at four times the time
    context.memory.deepcopy_host_arrays = False  # nobody changes them meanwhile
    with context, _quiet():
        for group in _groups(arrays, lambda item: item[1].nbytes):
            ocp.partial.save(target, dict(group))
        ocp.partial.finalize(target)


def stored(model_dir: pathlib.Path | str, part: str) -> dict[str, Spec]:
    """Dotted path -> dtype and shape of every array of a part on disk."""
    leaves = _metadata(_folder(model_dir, part))
    return {path: (np.dtype(leaf.dtype), tuple(leaf.shape)) for path, leaf in leaves.items()}


def load_arrays(model_dir: pathlib.Path | str, part: str, paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (dotted path, array) of a part as stored, in the order of `paths`, with `GROUP_BYTES` in memory at most."""
    folder = _folder(model_dir, part)
    leaves = _metadata(folder)
    for group in _groups(paths, lambda path: math.prod(leaves[path].shape) * np.dtype(leaves[path].dtype).itemsize):
        wanted = {path: leaf if path in group else ocp.PLACEHOLDER for path, leaf in leaves.items()}
        with _reading(folder):
            loaded = ocp.load(folder, wanted)
        for path in group:
            yield path, loaded.pop(path)


def load_params(
    model_dir: pathlib.Path | str,
    part: str,
    *,
    config: FaithDiffConfig | None = None,
    dtype: Any = None,
    sharding: jax.sharding.Sharding | Mapping[str, jax.sharding.Sharding] | None = None,
) -> Params:
    """Read the parameters of one part, each straight into its dtype and onto its devices.

    Args:
        model_dir: the model directory.
        part: a name of `part_names`.
        config: what `read_config` gave for the directory; None to read it here.
        dtype: the parameters' dtype; None for the stored ones, as published.
        sharding: where to put them: one sharding for all, or one for each dotted path; None for the first local
            device.

    Returns:
        The nested dictionary that `nnx.update` and `nnx.merge` take in place of the module's state.

    Raises:
        InputError: the part is damaged, or its arrays are not those of the architecture (all faults at once).
    """
    folder = _folder(model_dir, part)
    specs = stored(model_dir, part)
    config = config if config is not None else read_config(model_dir)
    faults = compare(part_shapes(config, part), {path: shape for path, (_, shape) in specs.items()})
    if faults:
        raise InputError(f"{folder}: does not fit {CONFIG}: {'; '.join(faults)}")
    place = sharding if sharding is not None else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        path: jax.ShapeDtypeStruct(
            shape,
            stored_dtype if dtype is None else dtype,
            sharding=place[path] if isinstance(place, Mapping) else place,
        )
        for path, (stored_dtype, shape) in specs.items()
    }
    # Orbax fails on an array that reaches its limit.
    largest = max(
        math.prod(shape) * max(stored_dtype.itemsize, wanted[path].dtype.itemsize)
        for path, (stored_dtype, shape) in specs.items()
    )
    context = ocp.Context()
    context.memory.read_concurrent_bytes = max(GROUP_BYTES, 2 * largest)
    with context, _reading(folder):
        return unflatten(ocp.load(folder, wanted))


def _groups(items: Iterable[Any], size: Any) -> Iterator[list[Any]]:
    """Cut into runs of `GROUP_BYTES` at most, or of one larger item."""
    group: list[Any] = []
    total = 0
    for item in items:
        if group and total + size(item) > GROUP_BYTES:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group


def _folders(config: FaithDiffConfig) -> list[str]:
    """What a model directory holds beside its configuration."""
    parts = [f"params/{part}" for part in part_names(config)]
    return parts + list(numbered("tokenizer", len(config.text_encoders)))


def _checksum(folder: pathlib.Path) -> str:
    """SHA-256 over the names and bytes of a folder's files."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _size(folder: pathlib.Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _metadata(folder: pathlib.Path) -> dict[str, Any]:
    """Dotted path -> what Orbax knows of the array, which also asks for it as an ndarray."""
    with _reading(folder):
        metadata = ocp.metadata(folder).metadata
        if not isinstance(metadata, dict) or not metadata:
            raise ValueError("its metadata is damaged")
        return metadata


def _folder(model_dir: pathlib.Path | str, part: str) -> pathlib.Path:
    return (pathlib.Path(model_dir) / "params" / part).absolute()


@contextlib.contextmanager
def _reading(folder: pathlib.Path) -> Iterator[None]:
    """What Orbax raises for a damaged checkpoint, sometimes a bare Exception, is an InputError here."""
    try:
        with _quiet():
            yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{folder}: cannot be read, convert the weights again ({reason})") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax reports on each of its steps, and logs beside what it raises."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
