"""Weights of RRDBNet: published files to a model directory, and back.

    NAME.pth, NAME.safetensors, NAME.param with NAME.bin -> sizes from the tensors' shapes -> MODEL_DIR -> NAME.pth

MODEL_DIR/config.yaml            format, model (RRDBNetConfig), names, files, provenance
MODEL_DIR/rrdbnet.safetensors    dotted paths, in the dtype of the published tensors
"""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import yaml

from faithdiff_jax._version import __version__
from faithdiff_jax.baselines.ncnn_files import NcnnFiles
from faithdiff_jax.baselines.rrdbnet import RGB, RRDBNet, RRDBNetConfig
from faithdiff_jax.config import from_dict, load_yaml, to_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.writing import refuse_existing, whole
from faithdiff_jax.models.parts import Params, module_shapes
from faithdiff_jax.weights.from_torch import Part, Track, refuse_misfits, untracked
from faithdiff_jax.weights.keymap import CONV, KeyMap, Rule
from faithdiff_jax.weights.safetensors_format import FileRecord, Place, read_header, read_tensor, shown
from faithdiff_jax.weights.stored_files import (
    CONFIG,
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
from faithdiff_jax.weights.tensor_files import TensorSource, open_tensors
from faithdiff_jax.weights.to_torch import state_dict_writer

FORMAT = "rrdbnet-1"
PART = "rrdbnet"
KEYS = ("format", "model", "names", "files", "provenance")

NAMES: dict[str, list[Rule]] = {
    "real-esrgan": [
        Rule("conv_first", "conv_first", CONV),
        Rule("body.{*}.rdb{d}.conv{i}", "body.rdb{d}.conv{i}", CONV),
        Rule("conv_body", "conv_body", CONV),
        Rule("conv_up{n}", "conv_up{n}", CONV),
        Rule("conv_hr", "conv_hr", CONV),
        Rule("conv_last", "conv_last", CONV),
    ],
    "bsrgan": [
        Rule("conv_first", "conv_first", CONV),
        Rule("RRDB_trunk.{*}.RDB{d}.conv{i}", "body.rdb{d}.conv{i}", CONV),
        Rule("trunk_conv", "conv_body", CONV),
        Rule("upconv{n}", "conv_up{n}", CONV),
        Rule("HRconv", "conv_hr", CONV),
        Rule("conv_last", "conv_last", CONV),
    ],
}
"""Who published the tensors (Real-ESRGAN; BSRGAN and BSRNet) -> the rules between their names and ours."""

# Under what a published .pth keeps its tensors: BasicSR's training writes the averaged parameters, and others.
WRAPPERS = ("params_ema", "params")
_BLOCK = {"real-esrgan": re.compile(r"body\.([0-9]+)\.rdb1"), "bsrgan": re.compile(r"RRDB_trunk\.([0-9]+)\.RDB1")}


def convert_rrdbnet(
    file: pathlib.Path | str, output: pathlib.Path | str, *, allow_nonfinite: bool = False, track: Track = untracked
) -> RRDBNetConfig:
    """Write a model directory from published weights.

    Args:
        file: a `.pth` or `.safetensors` file with the tensor names of Real-ESRGAN or of BSRGAN, or ncnn's `.param` or
            `.bin`, the other of which lies beside it.
        output: the model directory; it must not exist, or be empty.
        allow_nonfinite: whether tensors may hold NaN or infinite numbers.
        track: shows progress.

    Returns:
        The sizes that the tensors have.

    Raises:
        InputError: a file that is missing, damaged or of another network; every tensor at fault is named.
    """
    file, output = pathlib.Path(file), pathlib.Path(output)
    refuse_existing(output)
    source = _open(file)
    names = _naming(source, file)
    config = _config(source, names, file)
    part = Part(PART, _keymap(config, names), source, str(file))
    refuse_misfits([part])
    contents = part.contents(track)
    with whole(output, contents.size) as target:
        target.mkdir()
        files = write_parts(target, {PART: contents}, output=output, allow_nonfinite=allow_nonfinite)
        data = {
            "format": FORMAT,
            "model": to_dict(config),
            "names": names,
            "files": {name: found._asdict() for name, found in files.items()},
            "provenance": {"package": f"faithdiff-jax {__version__}", **part.provenance()},
        }
        (target / CONFIG).write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return config


def rrdbnet_to_torch(model_dir: pathlib.Path | str, output: pathlib.Path | str, track: Track = untracked) -> None:
    """Write the published layout, under the tensor names that the weights came with, each in its stored dtype.

    Args:
        model_dir: a model directory of an RRDBNet.
        output: a `.safetensors` file, or with torch installed a `.pth` as published: a bare state dict for BSRGAN, one
            under `params_ema` for Real-ESRGAN. It must not exist.
        track: shows progress.

    Raises:
        InputError: not such a directory, a damaged one, or an output that exists or is of another kind.
    """
    output = pathlib.Path(output)
    model = RRDBNetDirectory.open(model_dir)
    write = state_dict_writer(output, ".pth", under=WRAPPERS[0] if model.names == "real-esrgan" else None)
    refuse_existing(output)
    keymap = _keymap(model.config, model.names)
    places = model.places()
    # Wider numbers first: so every tensor is aligned in the file.
    entries = sorted(keymap.entries, key=lambda entry: -places[entry.path].dtype.itemsize)
    specs = {name: (places[entry.path].dtype, entry.published_shape) for entry in entries for name in entry.published}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for entry in entries:
            yield from keymap.write(entry, read_tensor(model.file, places[entry.path]))

    with whole(output, sum(place.size for place in places.values())) as target:
        write(target, specs, track(tensors(), output.name, len(specs)))


def is_rrdbnet(model_dir: pathlib.Path) -> bool:
    """Whether a folder is a model directory that says it holds an RRDBNet; what else it may be is not looked at."""
    return os.path.isfile(model_dir / CONFIG) and load_yaml(model_dir / CONFIG).get("format") == FORMAT


@dataclasses.dataclass(frozen=True)
class RRDBNetDirectory:
    """A model directory of an RRDBNet that has been opened: complete, and with the checksums in its config.yaml.

    Attributes:
        path: the directory.
        config: the sizes.
        names: whose tensor names the weights came with, a key of `NAMES`.
        provenance: where they are from, as plain data.
    """

    path: pathlib.Path
    config: RRDBNetConfig
    names: str
    provenance: Mapping[str, Any]

    @classmethod
    def open(cls, path: pathlib.Path | str) -> "RRDBNetDirectory":
        """Read config.yaml, and compare size and checksum of the weights.

        Raises:
            InputError: not a model directory of an RRDBNet, or one that is incomplete or altered.
        """
        path = pathlib.Path(path)
        source = str(path / CONFIG)
        data = read_config(path)
        if data.get("format") != FORMAT:
            raise InputError(f"{source}: format is {shown(repr(data.get('format')))}, that of an RRDBNet is {FORMAT!r}")
        refuse_unknown_keys(data, KEYS, source)
        config = from_dict(RRDBNetConfig, section(data, "model", source), source)
        names = data.get("names")
        if not isinstance(names, str) or names not in NAMES:
            raise InputError(f"{source}: names is {shown(repr(names))}: must be one of {', '.join(NAMES)}")
        records = section(data, "files", source)
        if records.keys() != {file_name(PART)}:
            raise InputError(f"{source}: files must list {file_name(PART)}, and nothing else")
        files: dict[str, FileRecord] = {name: parse_record(name, entry, source) for name, entry in records.items()}
        faults = size_faults(path, files)
        if faults:
            raise InputError(f"{path}: incomplete or altered: {'; '.join(faults)}")
        verify(path, files)
        return cls(path, config, names, section(data, "provenance", source, optional=True))

    @property
    def file(self) -> pathlib.Path:
        """The weights."""
        return self.path / file_name(PART)

    def places(self) -> dict[str, Place]:
        """Dotted path -> dtype, shape and place of every array."""
        return read_header(self.file)

    def load(self, *, dtype: Any = None, sharding: jax.sharding.Sharding | None = None) -> Params:
        """Read the parameters, cast to `dtype`, to where `sharding` says; None for the first local device.

        Raises:
            InputError: arrays that are not those of the sizes in config.yaml.
        """
        return load_part(self.file, self.places(), rrdbnet_shapes(self.config), dtype, sharding)


def rrdbnet_shapes(config: RRDBNetConfig) -> dict[str, tuple[int, ...]]:
    """Dotted path -> shape of every parameter. Nothing is computed or held."""
    return module_shapes(functools.partial(RRDBNet, config))


def _keymap(config: RRDBNetConfig, names: str) -> KeyMap:
    return KeyMap(NAMES[names], rrdbnet_shapes(config))


def _open(file: pathlib.Path) -> TensorSource:
    if file.suffix == ".param" or (file.suffix == ".bin" and file.with_suffix(".param").is_file()):
        return NcnnFiles(file.with_suffix(".param"))
    return open_tensors(file, under=WRAPPERS)


def _naming(source: TensorSource, file: pathlib.Path) -> str:
    """Whose tensor names a file has."""
    found = source.shapes()
    for names, rules in NAMES.items():
        if f"{_published(rules, 'conv_body')}.weight" in found:
            return names
    first = next(iter(found), None)
    known = " nor ".join(f"{_published(rules, 'conv_body')}.weight ({names})" for names, rules in NAMES.items())
    raise InputError(f"{file}: not an RRDBNet, it has neither {known}; its first tensor is {shown(first)}")


def _published(rules: list[Rule], ours: str) -> str:
    return next(rule.published for rule in rules if rule.ours == ours)


def _config(source: TensorSource, names: str, file: pathlib.Path) -> RRDBNetConfig:
    """The sizes of a network, from the shapes of its tensors; what does not fit them is found later."""
    shapes = source.shapes()
    blocks = {int(match[1]) for name in shapes if (match := _BLOCK[names].match(name)) and len(match[1]) < 5}
    body = _published(NAMES[names], "body.rdb{d}.conv{i}").replace("{*}", "0").format(d=1, i=1)
    wanted = ("conv_first.weight", f"{body}.weight")
    for name in wanted:
        if len(shapes.get(name, ())) != 4:
            raise InputError(f"{file}: not an RRDBNet, {name} is {shapes.get(name, 'missing')}: must have 4 axes")
    (channels, inputs, _, _), (growth, _, _, _) = (shapes[name] for name in wanted)
    unshuffle = {RGB: 1, 4 * RGB: 2, 16 * RGB: 4}.get(inputs)
    if unshuffle is None:
        raise InputError(f"{file}: conv_first.weight has {inputs} input channels: must be 3 (x4), 12 (x2) or 48 (x1)")
    doublings = 2 if f"{_published(NAMES[names], 'conv_up{n}').format(n=2)}.weight" in shapes else 1
    try:
        return RRDBNetConfig(max(blocks, default=0) + 1, channels, growth, unshuffle, doublings)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
