"""Model directories of earlier versions -> the format of this one. Parameters stay as they are, bit for bit.

OLD_DIR/config.yaml       format 1, model, sizes, checksums of small models, provenance
OLD_DIR/params/<part>/    one Orbax checkpoint each: {dotted path: array}
"""

import contextlib
import hashlib
import logging
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from orbax.checkpoint import v1 as ocp

from faithdiff_jax.config import from_dict, load_yaml
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.writing import refuse_existing
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import part_names, part_shapes
from faithdiff_jax.weights.from_torch import Track, untracked
from faithdiff_jax.weights.keymap import compare
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.safetensors_format import Spec, Tensor
from faithdiff_jax.weights.stored_files import CONFIG, Contents

# How much of a part is in memory at a time.
GROUP_BYTES = 2**30


def upgrade(
    old: pathlib.Path | str,
    output: pathlib.Path | str,
    *,
    defaults: Mapping[str, Any] | None = None,
    allow_nonfinite: bool = False,
    track: Track = untracked,
) -> None:
    """Write a model directory of format 1 anew.

    Args:
        old: the model directory.
        output: the new one; it must not exist, or be empty.
        defaults: the model's own defaults of restoring, which format 1 has no place for.
        allow_nonfinite: whether parameters may be NaN or infinite.
        track: shows progress.

    Raises:
        InputError: not a model directory of format 1, or one that is incomplete or damaged.
    """
    old = pathlib.Path(old)
    refuse_existing(pathlib.Path(output))
    file = old / CONFIG
    data = load_yaml(file)
    if data.get("format") != 1 or not isinstance(data.get("model"), dict):
        raise InputError(f"{file}: must be of a model directory of format 1, its format is {data.get('format')!r}")
    config = from_dict(FaithDiffConfig, data["model"], str(file))
    provenance = data.get("provenance")
    _refuse_incomplete(old, data.get("sizes"))
    _refuse_damaged(old, data.get("checksums"))
    parts = {}
    for part in part_names(config):
        specs, arrays = _contents(old / "params" / part)
        faults = compare(part_shapes(config, part), {path: shape for path, (_, shape) in specs.items()})
        if faults:
            raise InputError(f"{old / 'params' / part}: does not fit {CONFIG}: {'; '.join(faults)}")
        parts[part] = Contents(specs, track(arrays, part, len(specs)))
    was = {"format": 1, "digest": hashlib.sha256(file.read_bytes()).hexdigest()}
    ModelDirectory.write(
        output,
        config,
        parts,
        tokenizers=old,
        provenance={**(provenance if isinstance(provenance, dict) else {}), "upgraded_from": was},
        defaults=defaults,
        allow_nonfinite=allow_nonfinite,
    )


def _contents(folder: pathlib.Path) -> Contents:
    """A part's arrays, of which `GROUP_BYTES` (or one) are read at a time."""
    with _reading(folder):
        leaves = ocp.metadata(folder.resolve()).metadata
        if not isinstance(leaves, dict) or not leaves:
            raise ValueError("its metadata is damaged")
        specs: dict[str, Spec] = {path: (np.dtype(leaf.dtype), tuple(leaf.shape)) for path, leaf in leaves.items()}

    def arrays() -> Iterator[tuple[str, Tensor]]:
        for group in groups(specs, lambda path: math.prod(specs[path][1]) * specs[path][0].itemsize, GROUP_BYTES):
            wanted = {path: leaf if path in group else ocp.PLACEHOLDER for path, leaf in leaves.items()}
            with _reading(folder):
                loaded = ocp.load(folder.resolve(), wanted)
            for path in group:
                yield path, loaded.pop(path)

    return Contents(specs, arrays())


def groups(names: Iterable[str], size: Callable[[str], int], most: int) -> Iterator[list[str]]:
    """Cut names into runs whose sizes sum to `most` at most, or of one that is larger."""
    group: list[str] = []
    total = 0
    for name in names:
        if group and total + size(name) > most:
            yield group
            group, total = [], 0
        group.append(name)
        total += size(name)
    if group:
        yield group


def _refuse_incomplete(old: pathlib.Path, sizes: Any) -> None:
    """Compare the bytes that each part must have: after a file that breaks off Orbax leaves reads behind."""
    for part, size in sizes.items() if isinstance(sizes, dict) else ():
        found = sum(path.stat().st_size for path in (old / "params" / str(part)).rglob("*") if path.is_file())
        if not isinstance(size, int) or found < size:
            raise InputError(f"{old}: is incomplete: params/{part} has {found} bytes of {size}")


def _refuse_damaged(old: pathlib.Path, checksums: Any) -> None:
    """Compare the checksums that small models have: SHA-256 over the names and contents of a folder's files."""
    for name, checksum in checksums.items() if isinstance(checksums, dict) else ():
        total = hashlib.sha256()
        for path in sorted(path for path in (old / str(name)).rglob("*") if path.is_file()):
            total.update(path.relative_to(old / name).as_posix().encode() + b"\0")
            total.update(hashlib.sha256(path.read_bytes()).digest())
        if total.hexdigest() != checksum:
            raise InputError(f"{old}: {name} was changed or is damaged: its checksum is not the one in {CONFIG}")


@contextlib.contextmanager
def _reading(folder: pathlib.Path) -> Iterator[None]:
    """What Orbax raises for a damaged checkpoint, sometimes a bare Exception, is an InputError here."""
    logger = logging.getLogger("absl")  # Orbax reports on each of its steps, and logs beside what it raises
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{folder}: cannot be read ({reason})") from None
    finally:
        logger.setLevel(level)
