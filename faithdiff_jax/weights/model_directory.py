"""Model directories: an architecture and its parameters, as `faithdiff convert` writes and `FaithDiff.load` reads.

MODEL_DIR/config.yaml           format, model (FaithDiffConfig), restore (defaults), files, provenance
MODEL_DIR/<part>.safetensors    one file per part: dotted paths, in the dtype of the published tensors
MODEL_DIR/tokenizer*/           as published, one for each text encoder
MODEL_DIR/README.md             a model card, so that the directory can be uploaded to the Hugging Face hub as it is
"""

import functools
import hashlib
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml

from faithdiff_jax._version import __version__
from faithdiff_jax.config import from_dict, load_yaml, to_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.writing import refuse_existing, whole
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import Params, numbered, part_names, part_shapes, unflatten
from faithdiff_jax.weights import safetensors_format
from faithdiff_jax.weights.keymap import compare
from faithdiff_jax.weights.model_card import model_card
from faithdiff_jax.weights.safetensors_format import Arrays, FileRecord, Place, Spec, shown
from faithdiff_jax.weights.tokenizer_files import FILE_NAME, copy_tokenizers, tokenizer_files

FORMAT = 2
CONFIG = "config.yaml"
CARD = "README.md"
KEYS = ("format", "model", "restore", "files", "provenance")
# The checksums of models up to this size are compared whenever they are opened.
CHECKED_BYTES = 2**28
NAMED_AT_MOST = 20

Index = tuple[slice, ...]
"""A slice for each axis."""

_FILE_NAME = re.compile(rf"[a-z0-9_]+\.safetensors|tokenizer(_[0-9]+)?/{FILE_NAME}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Contents(NamedTuple):
    """What a part's file is to hold."""

    specs: Mapping[str, Spec]
    """Dotted path -> dtype and shape."""
    arrays: Arrays
    """(dotted path, array) in the order of `specs`; one is asked for when the one before is written."""

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "Contents":
        """Arrays in memory."""
        return cls({path: (array.dtype, array.shape) for path, array in arrays.items()}, arrays.items())

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(Place(dtype, shape, 0).size for dtype, shape in self.specs.values())


class ModelDirectory:
    """A model directory that has been opened: complete, and as its `config.yaml` says.

    Attributes:
        path: the directory.
        config: the architecture.
        defaults: the model's own defaults of restoring, as plain data; what it leaves out has the package's default.
        files: name, relative to the directory -> size and SHA-256 of every file but `config.yaml` and `README.md`.
        provenance: where the parameters are from, as plain data.
        digest: SHA-256 of `config.yaml`, and by the checksums in it of the whole model.
    """

    def __init__(self, path: pathlib.Path, data: Mapping[str, Any], digest: str):
        """Take what `config.yaml` holds; `open` reads it."""
        source = str(path / CONFIG)
        self._headers: dict[str, dict[str, Place]] = {}
        self.path = path
        self.digest = digest
        self.config = from_dict(FaithDiffConfig, _mapping(data, "model", source), source)
        self.defaults: dict[str, Any] = dict(_mapping(data, "restore", source))
        self.provenance: dict[str, Any] = dict(_mapping(data, "provenance", source))
        self.files = _records(_mapping(data, "files", source), self.config, source)

    @classmethod
    def open(cls, path: pathlib.Path | str, verify: bool | None = None) -> "ModelDirectory":
        """Read `config.yaml` and see that every file is there with all its bytes.

        Args:
            path: the model directory.
            verify: compare the checksum of every file too; None does so for models up to 256 MiB.

        Raises:
            InputError: not a model directory, or one that is incomplete, altered, of another format or with an unknown
                key.
        """
        path = pathlib.Path(path)
        if not path.is_dir():
            raise InputError(f"{path}: no such model directory (faithdiff convert makes one)")
        file = path / CONFIG
        if not file.is_file():
            raise InputError(f"{path}: not a model directory, it has no {CONFIG} (faithdiff convert makes one)")
        data = load_yaml(file)
        if type(data.get("format")) is int and data["format"] == 1:
            raise InputError(
                f"{path}: was written by an earlier version (format 1); "
                f"convert it with: faithdiff convert --upgrade {path} --output NEW_DIR"
            )
        if type(data.get("format")) is not int or data["format"] != FORMAT:
            raise InputError(f"{file}: format is {data.get('format')!r}, this version reads format {FORMAT}")
        unknown = sorted(shown(str(key)) for key in data if key not in KEYS)
        if unknown:
            raise InputError(f"{file}: unknown key {', '.join(unknown)} (known there: {', '.join(KEYS)})")
        model = cls(path, data, hashlib.sha256(file.read_bytes()).hexdigest())
        model._check_sizes()
        if verify or (verify is None and sum(record.bytes for record in model.files.values()) <= CHECKED_BYTES):
            model.verify()
        return model

    def verify(self) -> None:
        """Compare the checksum of every file.

        Raises:
            InputError: files that were changed or are damaged, all of them named.
        """
        changed = [name for name, wanted in self.files.items() if safetensors_format.record(self.path / name) != wanted]
        if changed:
            raise InputError(
                f"{self.path}: {', '.join(changed)} changed or damaged: the checksum is not the one in {CONFIG}"
            )

    @property
    def tokenizers(self) -> list[pathlib.Path]:
        """The folder of each text encoder's tokenizer."""
        return [self.path / name for name in numbered("tokenizer", len(self.config.text_encoders))]

    def specs(self, part: str) -> dict[str, Spec]:
        """Dotted path -> dtype and shape of every array of a part, as stored.

        Raises:
            InputError: the part's file is damaged.
        """
        return {name: (place.dtype, place.shape) for name, place in self._places(part).items()}

    def arrays(self, part: str, paths: Iterable[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (dotted path, array) of a part as stored, in the order of `paths`; None for all, as they are stored."""
        places = self._places(part)
        for path in places if paths is None else paths:
            yield path, safetensors_format.read_tensor(self._file(part), places[path])

    def contents(self, part: str) -> Contents:
        """A part as it is stored, to `write` elsewhere."""
        return Contents(self.specs(part), self.arrays(part))

    def load(
        self,
        part: str,
        *,
        config: FaithDiffConfig | None = None,
        dtype: Any = None,
        sharding: jax.sharding.Sharding | Mapping[str, jax.sharding.Sharding] | None = None,
    ) -> Params:
        """Read the parameters of one part onto their devices; of each only what this process's devices hold, once.

        Args:
            part: a name of `part_names`.
            config: the architecture to hold the part to; None for the model's own.
            dtype: the parameters' dtype, cast as they are read; None for the stored ones.
            sharding: where to put them: one sharding for all, or one for each dotted path; None for the first local
                device.

        Returns:
            The nested dictionary that `nnx.update` and `nnx.merge` take in place of the module's state.

        Raises:
            InputError: the part is damaged, or its arrays are not those of the architecture (all faults at once).
        """
        places = self._places(part)
        shapes = part_shapes(config or self.config, part)
        faults = compare(shapes, {path: place.shape for path, place in places.items()})
        if faults:
            raise InputError(f"{self._file(part)}: does not fit {CONFIG}: {'; '.join(faults)}")
        at = sharding if sharding is not None else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        loaded = {}
        for path in shapes:
            place = places[path]
            target = at[path] if isinstance(at, Mapping) else at
            read = _reader(self._file(part), place, place.dtype if dtype is None else np.dtype(dtype))
            loaded[path] = jax.make_array_from_callback(place.shape, target, read)
        return unflatten(loaded)

    @staticmethod
    def write(
        output: pathlib.Path | str,
        config: FaithDiffConfig,
        parts: Mapping[str, Contents],
        *,
        tokenizers: pathlib.Path | str,
        provenance: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        allow_nonfinite: bool = False,
    ) -> None:
        """Write a model directory, whole or not at all, one array at a time.

        Args:
            output: the directory; it must not exist, or be empty.
            config: the architecture.
            parts: part name -> what it holds; every part of the architecture, exactly.
            tokenizers: a folder with `tokenizer/`, `tokenizer_2/`, ...; a model directory is one.
            provenance: plain data on where the parameters are from; the package's version is added.
            defaults: the model's own defaults of restoring, plain data.
            allow_nonfinite: whether parameters may be NaN or infinite.

        Raises:
            ValueError: parts that are not the architecture's.
            InputError: an output that exists or cannot be written, tokenizers that are missing, or parameters that are
                NaN or infinite, by name.
        """
        output = pathlib.Path(output)
        refuse_existing(output)
        names = part_names(config)
        if set(parts) != set(names):
            raise ValueError(f"parts are {', '.join(sorted(parts))}: must be {', '.join(sorted(names))}")
        for part in names:
            faults = compare(part_shapes(config, part), {path: shape for path, (_, shape) in parts[part].specs.items()})
            if faults:
                raise ValueError(f"{part}: does not fit the architecture: {'; '.join(faults)}")
        copied = tokenizer_files(tokenizers, numbered("tokenizer", len(config.text_encoders)))
        size = sum(part.size for part in parts.values()) + sum(file.stat().st_size for file in copied.values())
        nonfinite: list[str] = []
        with whole(output, size) as target:
            target.mkdir()
            files = {}
            for part in names:
                arrays = parts[part].arrays if allow_nonfinite else _noting(parts[part].arrays, part, nonfinite)
                file = target / _file_name(part)
                files[file.name] = safetensors_format.write_tensors(file, parts[part].specs, arrays)
            if nonfinite:
                more = f" and {len(nonfinite) - NAMED_AT_MOST} more" * (len(nonfinite) > NAMED_AT_MOST)
                raise InputError(
                    f"{output}: not written, NaN or infinite are {', '.join(nonfinite[:NAMED_AT_MOST])}{more} "
                    "(--allow-nonfinite writes them anyway)"
                )
            files |= copy_tokenizers(copied, target)
            data = {
                "format": FORMAT,
                "model": to_dict(config),
                "restore": dict(defaults or {}),
                "files": {name: found._asdict() for name, found in files.items()},
                "provenance": {"package": f"faithdiff-jax {__version__}", **provenance},
            }
            text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
            (target / CONFIG).write_text(text, encoding="utf-8")
            specs = {part: parts[part].specs for part in names}
            (target / CARD).write_text(model_card(output.name, config, specs), encoding="utf-8")

    def _places(self, part: str) -> dict[str, Place]:
        if part not in self._headers:
            self._headers[part] = safetensors_format.read_header(self._file(part))
        return self._headers[part]

    def _file(self, part: str) -> pathlib.Path:
        return self.path / _file_name(part)

    def _check_sizes(self) -> None:
        # A copy that was cut short, or a file that was left out.
        faults = []
        for name, wanted in self.files.items():
            file = self.path / name
            found = file.stat().st_size if file.is_file() else None
            if found is None:
                faults.append(f"has no {name}")
            elif found != wanted.bytes:
                faults.append(f"{name} has {found} of {wanted.bytes} bytes")
        for folder in self.tokenizers:
            if folder.is_dir():
                unknown = {f"{folder.name}/{file.name}" for file in folder.iterdir()} - self.files.keys()
                faults += [f"{shown(name)} is not listed in {CONFIG}" for name in sorted(unknown)]
        if faults:
            raise InputError(f"{self.path}: incomplete or altered: {'; '.join(faults)}")


def _file_name(part: str) -> str:
    return f"{part}.safetensors"


def _reader(file: pathlib.Path, place: Place, dtype: np.dtype[Any]) -> Callable[[Index | None], np.ndarray]:
    """A function that reads slices of a tensor in another dtype, each once: devices may hold the same one."""

    @functools.cache
    def read(ranges: tuple[tuple[int, int], ...]) -> np.ndarray:
        index = tuple(slice(start, stop) for start, stop in ranges)
        return safetensors_format.read_slice(file, place, index).astype(dtype, copy=False)

    def read_index(index: Index | None) -> np.ndarray:
        index = index or (slice(None),) * len(place.shape)
        return read(tuple(axis.indices(length)[:2] for axis, length in zip(index, place.shape, strict=True)))

    return read_index


def _noting(arrays: Arrays, part: str, nonfinite: list[str]) -> Arrays:
    """Pass arrays on, and note the names of those with NaN or infinite numbers."""
    for path, array in arrays:
        if not safetensors_format.is_finite(array):
            nonfinite.append(f"{part}.{path}")
        yield path, array


def _mapping(data: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    """A section of config.yaml; only `restore` and `provenance` may be left out."""
    value = data.get(key, {} if key in ("restore", "provenance") else None)
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{source}: {key} is {shown(repr(value))}: must be a mapping of names to values")
    return value


def _records(data: Mapping[str, Any], config: FaithDiffConfig, source: str) -> dict[str, FileRecord]:
    """The section `files`: every part's file and each tokenizer's, with size and checksum."""
    records = {}
    for name, entry in data.items():
        if not _FILE_NAME.fullmatch(name):
            raise InputError(f"{source}: files has {shown(name)}: must be PART.safetensors or a tokenizer's file")
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise InputError(f"{source}: files.{shown(name)} must have bytes and sha256")
        size, checksum = entry["bytes"], entry["sha256"]
        if type(size) is not int or size < 0 or not isinstance(checksum, str) or not _SHA256.fullmatch(checksum):
            raise InputError(f"{source}: files.{shown(name)} must have bytes, 0 or more, and 64 hexadecimal digits")
        records[name] = FileRecord(size, checksum)
    folders = numbered("tokenizer", len(config.text_encoders))
    known = {_file_name(part) for part in part_names(config)}
    missing = sorted(known - records.keys())
    missing += [f"{folder}/" for folder in folders if not any(name.startswith(f"{folder}/") for name in records)]
    unknown = sorted(name for name in records.keys() - known if name.split("/")[0] not in folders)
    if missing or unknown:
        faults = [f"no {name}" for name in missing] + [f"{shown(name)}, which the model has not" for name in unknown]
        raise InputError(f"{source}: files lists {', '.join(faults)}")
    return records
