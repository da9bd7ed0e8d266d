"""Model directories: an architecture and its parameters, as `faithdiff convert` writes and `FaithDiff.load` reads.

MODEL_DIR/config.yaml           format, model (FaithDiffConfig), restore (defaults), files, provenance
MODEL_DIR/<part>.safetensors    one file per part: dotted paths, in the dtype of the published tensors
MODEL_DIR/tokenizer*/           as published, one for each text encoder
MODEL_DIR/README.md             a model card, so that the directory can be uploaded to the Hugging Face hub as it is
"""

import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import yaml

from faithdiff_jax._version import __version__
from faithdiff_jax.config import from_dict, to_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.places import is_remote, place, require_reachable
from faithdiff_jax.files.writing import refuse_existing, whole
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import Params, numbered, part_names, part_shapes
from faithdiff_jax.weights import safetensors_format
from faithdiff_jax.weights.keymap import compare
from faithdiff_jax.weights.model_card import model_card
from faithdiff_jax.weights.remote import fetched
from faithdiff_jax.weights.safetensors_format import FileRecord, Place, Spec, Tensor, shown
from faithdiff_jax.weights.stored_files import (
    CONFIG,
    Contents,
    Finish,
    file_name,
    load_part,
    parse_record,
    read_config,
    refuse_unknown_keys,
    section,
    size_faults,
    verify,
    write_parts,
)
from faithdiff_jax.weights.tokenizer_files import FILE_NAME, copy_tokenizers, tokenizer_files

FORMAT = 2
CARD = "README.md"
KEYS = ("format", "model", "restore", "files", "provenance")
# The checksums of models up to this size are compared whenever they are opened.
CHECKED_BYTES = 2**28

_FILE_NAME = re.compile(rf"[a-z0-9_]+\.safetensors|tokenizer(_[0-9]+)?/{FILE_NAME}")


class ModelDirectory:
    """A model directory that has been opened: complete, and as its `config.yaml` says.

    Attributes:
        path: the directory; of a remote one the copy on this machine.
        source: the directory that was opened.
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
        self.path = self.source = path
        self.digest = digest
        self.config = from_dict(FaithDiffConfig, section(data, "model", source), source)
        self.defaults: dict[str, Any] = dict(section(data, "restore", source, optional=True))
        self.provenance: dict[str, Any] = dict(section(data, "provenance", source, optional=True))
        self.files = _records(section(data, "files", source), self.config, source)

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool | None = None) -> "ModelDirectory":
        """Read `config.yaml` and see that every file is there with all its bytes.

        Args:
            path: the model directory; a remote one (gs://) is fetched once, and its checksums compared.
            verify: compare the checksum of every file too; None does so for models up to 256 MiB.

        Raises:
            InputError: not a model directory, or one that is incomplete, altered, of another format or with an unknown
                key.
        """
        path = place(path)
        require_reachable(path)
        file = path / CONFIG
        data = read_config(path)
        if type(data.get("format")) is int and data["format"] == 1:
            raise InputError(
                f"{path}: was written by an earlier version (format 1); "
                f"convert it with: faithdiff convert --upgrade {path} --output NEW_DIR"
            )
        if str(data.get("format")).startswith("rrdbnet"):
            raise InputError(
                f"{path}: is Real-ESRGAN, BSRGAN or BSRNet, no FaithDiff; "
                f"it restores with: faithdiff evaluate --baseline NAME={path} --pairs SET --output RESULT_DIR"
            )
        if type(data.get("format")) is not int or data["format"] != FORMAT:
            raise InputError(f"{file}: format is {data.get('format')!r}, this version reads format {FORMAT}")
        refuse_unknown_keys(data, KEYS, str(file))
        model = cls(path, data, hashlib.sha256(file.read_bytes()).hexdigest())
        if is_remote(path):
            model.path = fetched(path, model.files, model.digest)
        model._check_sizes()
        if verify or (verify is None and sum(record.bytes for record in model.files.values()) <= CHECKED_BYTES):
            model.verify()
        return model

    def verify(self) -> None:
        """Compare the checksum of every file.

        Raises:
            InputError: files that were changed or are damaged, all of them named.
        """
        verify(self.path, self.files)

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

    def arrays(self, part: str, paths: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
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
        finish: Finish | None = None,
    ) -> Params:
        """Read the parameters of one part onto their devices; of each only what this process's devices hold, once.

        Args:
            part: a name of `part_names`.
            config: the architecture to hold the part to; None for the model's own.
            dtype: see `stored_files.load_part`, for the result and the errors too.
            sharding: see there.
            finish: see there.

        Raises:
            InputError: the part is damaged, or does not fit the architecture.
        """
        shapes = part_shapes(config or self.config, part)
        return load_part(self._file(part), self._places(part), shapes, dtype, sharding, finish)

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
        with whole(output, size) as target:
            target.mkdir()
            ordered = {part: parts[part] for part in names}
            files = write_parts(target, ordered, output=output, allow_nonfinite=allow_nonfinite)
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
        return self.path / file_name(part)

    def _check_sizes(self) -> None:
        faults = size_faults(self.path, self.files)
        for folder in self.tokenizers:
            if folder.is_dir():
                unknown = {f"{folder.name}/{file.name}" for file in folder.iterdir()} - self.files.keys()
                faults += [f"{shown(name)} is not listed in {CONFIG}" for name in sorted(unknown)]
        if faults:
            raise InputError(f"{self.path}: incomplete or altered: {'; '.join(faults)}")


def _records(data: Mapping[str, Any], config: FaithDiffConfig, source: str) -> dict[str, FileRecord]:
    """The section `files`: every part's file and each tokenizer's, with size and checksum."""
    records = {}
    for name, entry in data.items():
        if not _FILE_NAME.fullmatch(name):
            raise InputError(f"{source}: files has {shown(name)}: must be PART.safetensors or a tokenizer's file")
        records[name] = parse_record(name, entry, source)
    folders = numbered("tokenizer", len(config.text_encoders))
    known = {file_name(part) for part in part_names(config)}
    missing = sorted(known - records.keys())
    missing += [f"{folder}/" for folder in folders if not any(name.startswith(f"{folder}/") for name in records)]
    unknown = sorted(name for name in records.keys() - known if name.split("/")[0] not in folders)
    if missing or unknown:
        faults = [f"no {name}" for name in missing] + [f"{shown(name)}, which the model has not" for name in unknown]
        raise InputError(f"{source}: files lists {', '.join(faults)}")
    return records
