"""Published weights as named tensors, read one by one: safetensors, torch's `.bin`, shards of either.

path -> open_tensors -> TensorSource: shapes, dtypes, get(name)
"""

import abc
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.reading import read_json, require_file
from faithdiff_jax.weights import safetensors_format
from faithdiff_jax.weights.safetensors_format import Tensor, shown

TORCH_SUFFIXES = (".bin", ".pt", ".pth")
CHECKPOINT_SUFFIX = ".ckpt"
"""Of torch.save too, by the name that whole checkpoints of the original code have."""
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*\.(safetensors|bin|pt|pth)")
NAMED_AT_MOST = 20
INDEX = re.compile(r"\.index(\.\w+)?\.json$")

# A mapped file is opened anew after this many bytes: what was read of it counts as memory of ours until then.
MAPPED_BYTES = 2**28


_DTYPES_BY_NAME = {dtype.name: dtype for dtype in safetensors_format.DTYPES.values()}


class TensorSource(abc.ABC):
    """Named tensors that are on disk, or can be made at once; each is read when it is asked for."""

    files: tuple[pathlib.Path, ...] = ()
    """Where the tensors are; empty for tensors that are not published but made."""

    @abc.abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, published layout."""

    @abc.abstractmethod
    def dtypes(self) -> dict[str, np.dtype]:
        """Name -> dtype, `ml_dtypes.bfloat16` included."""

    @abc.abstractmethod
    def get(self, name: str) -> Tensor:
        """Read one tensor into an array of its own."""


def open_tensors(path: pathlib.Path, under: Sequence[str] = ()) -> TensorSource:
    """Open one file, or the set that an `*.index.json` lists.

    Args:
        path: the file.
        under: keys that a file of torch.save may keep its state dict under; the first that is there counts.

    Raises:
        InputError: the file is missing, damaged, of another kind, or needs torch where there is none.
    """
    require_file(path, "weight file")
    if INDEX.search(path.name):
        return Shards(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    of_torch = (*TORCH_SUFFIXES, CHECKPOINT_SUFFIX)
    if path.suffix in of_torch:
        return TorchFile(path, under)
    raise InputError(f"{path}: weights are .safetensors, {', '.join(of_torch)} or an .index.json of such files")


class SafetensorsFile(TensorSource):
    """One `.safetensors` file."""

    def __init__(self, path: pathlib.Path):
        self.files = (path,)
        self._places = safetensors_format.read_header(path)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `TensorSource`."""
        return {name: place.shape for name, place in self._places.items()}

    def dtypes(self) -> dict[str, np.dtype]:
        """See `TensorSource`."""
        return {name: place.dtype for name, place in self._places.items()}

    def get(self, name: str) -> Tensor:
        """See `TensorSource`."""
        return safetensors_format.read_tensor(self.files[0], self._places[name])


class TorchFile(TensorSource):
    """One file of torch.save, loaded by torch's safe loader: a state dict of plain tensors and nothing else.

    Files of torch before 1.6 cannot be mapped and are held in memory.
    """

    def __init__(self, path: pathlib.Path, under: Sequence[str] = ()):
        self.files = (path,)
        self._under = under
        try:
            import torch
        except ImportError:
            raise InputError(f"{path}: reading it needs PyTorch: pip install 'faithdiff-jax[torch]'") from None
        self._torch = torch
        self._mapped = zipfile.is_zipfile(path)
        self._tensors = self._load()
        self._read = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `TensorSource`."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtypes(self) -> dict[str, np.dtype]:
        """See `TensorSource`."""
        return {name: _DTYPES_BY_NAME[_dtype_name(tensor)] for name, tensor in self._tensors.items()}

    def get(self, name: str) -> Tensor:
        """See `TensorSource`."""
        array: Tensor
        tensor = self._tensors[name]
        self._read += tensor.nbytes
        if tensor.dtype == self._torch.bfloat16:
            array = tensor.view(self._torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
        else:
            array = np.array(tensor.numpy())
        if self._mapped and self._read > MAPPED_BYTES:
            del tensor
            self._tensors = {}
            self._tensors, self._read = self._load(), 0
        return array

    def _load(self) -> dict[str, Any]:
        path = self.files[0]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickles of kinds that are refused below
                state = self._torch.load(path, map_location="cpu", weights_only=True, mmap=self._mapped)
        except pickle.UnpicklingError:
            raise InputError(
                f"{path}: a pickle that holds more than plain tensors; it could run code of its author's, so only "
                "plain tensors are loaded"
            ) from None
        except Exception as error:  # a damaged file fails anywhere inside the unpickler, with any exception
            reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
            raise InputError(f"{path}: not a file of torch.save, or a damaged one ({reason})") from None
        if isinstance(state, dict):
            state = next((state[key] for key in self._under if isinstance(state.get(key), dict)), state)
        if not isinstance(state, dict):
            raise InputError(f"{path}: holds {type(state).__name__}, a state dict (names to tensors) is needed")
        for key, tensor in state.items():
            if not isinstance(key, str):
                raise InputError(f"{path}: has the key {shown(repr(key))}, a state dict of names to tensors is needed")
            name = shown(key)
            if not isinstance(tensor, self._torch.Tensor):
                raise InputError(f"{path}: {name} is {type(tensor).__name__}, a state dict of tensors is needed")
            if tensor.layout != self._torch.strided or _dtype_name(tensor) not in _DTYPES_BY_NAME:
                raise InputError(f"{path}: {name} is {tensor.dtype}, {tensor.layout}: must be a dense tensor of floats")
        return {name: tensor.detach() for name, tensor in state.items()}


class Shards(TensorSource):
    """The files that an index lists, as one source."""

    def __init__(self, index: pathlib.Path):
        data = read_json(index)
        places = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise InputError(f"{index}: not an index of weight files (no weight_map of tensor names to file names)")
        by_file: dict[str, list[str]] = {}
        for name, file in places.items():
            by_file.setdefault(file, []).append(name)
        outside = sorted(shown(file) for file in by_file if not _SHARD.fullmatch(file))
        if outside:
            raise InputError(f"{index}: lists {', '.join(outside[:NAMED_AT_MOST])}: must be weight files beside it")
        self._sources: dict[str, TensorSource] = {}
        faults, parts = [], []
        for file, names in by_file.items():
            part = open_tensors(index.parent / file)
            parts.append(part)
            found = part.shapes()
            faults += [f"{shown(name)} is not in {file}" for name in names if name not in found]
            faults += [f"{shown(name)} in {file} is not in the index" for name in found if places.get(name) != file]
            self._sources |= dict.fromkeys(names, part)
        if faults:
            more = f" and {len(faults) - NAMED_AT_MOST} more" * (len(faults) > NAMED_AT_MOST)
            raise InputError(f"{index}: does not fit its files: {'; '.join(faults[:NAMED_AT_MOST])}{more}")
        self.files = tuple(file for part in parts for file in part.files)
        self._parts = parts

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `TensorSource`."""
        return {name: shape for part in self._parts for name, shape in part.shapes().items()}

    def dtypes(self) -> dict[str, np.dtype]:
        """See `TensorSource`."""
        return {name: dtype for part in self._parts for name, dtype in part.dtypes().items()}

    def get(self, name: str) -> Tensor:
        """See `TensorSource`."""
        return self._sources[name].get(name)


class Renamed(TensorSource):
    """Another source under other names; those that `rename` maps to None are left out.

    Raises:
        InputError: two tensors get the same name.
    """

    def __init__(self, source: TensorSource, rename: Callable[[str], str | None]):
        self.files = source.files
        self._source = source
        self._names: dict[str, str] = {}
        for old in source.shapes():
            new = rename(old)
            if new is None:
                continue
            if new in self._names:
                raise InputError(
                    f"{source.files[0]}: holds both {shown(self._names[new])} and {shown(old)}, which are the same"
                )
            self._names[new] = old

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `TensorSource`."""
        shapes = self._source.shapes()
        return {new: shapes[old] for new, old in self._names.items()}

    def dtypes(self) -> dict[str, np.dtype]:
        """See `TensorSource`."""
        dtypes = self._source.dtypes()
        return {new: dtypes[old] for new, old in self._names.items()}

    def get(self, name: str) -> Tensor:
        """See `TensorSource`."""
        return self._source.get(self._names[name])


class Arrays(TensorSource):
    """Tensors that are not published but made here."""

    def __init__(self, arrays: Mapping[str, Tensor]):
        self._arrays = arrays

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `TensorSource`."""
        return {name: array.shape for name, array in self._arrays.items()}

    def dtypes(self) -> dict[str, np.dtype]:
        """See `TensorSource`."""
        return {name: array.dtype for name, array in self._arrays.items()}

    def get(self, name: str) -> Tensor:
        """See `TensorSource`."""
        return self._arrays[name]


_LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY_PATTERN = re.compile(r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)$")


def with_current_vae_names(source: TensorSource) -> TensorSource:
    """Give the attention of a VAE saved by diffusers before 0.15 its later names; others are left as they are."""

    def rename(name: str) -> str:
        return _LEGACY_PATTERN.sub(lambda m: f"{m[1]}.{_LEGACY_ATTENTION[m[2]]}.{m[3]}", name)

    return Renamed(source, rename)


def with_text_model_names(source: TensorSource) -> TensorSource:
    """Name a text encoder's tensors as published.

    transformers 5 saves CLIPTextModel without the prefix `text_model.`; transformers before 4.31 saved the constant
    `position_ids`.
    """
    prefix = "" if any(name.startswith("text_model.") for name in source.shapes()) else "text_model."

    def rename(name: str) -> str | None:
        if name.endswith("embeddings.position_ids"):
            return None
        return name if name.startswith("text_projection.") else prefix + name

    return Renamed(source, rename)


def _dtype_name(tensor: Any) -> str:
    """torch.float16 -> "float16"."""
    return str(tensor.dtype).removeprefix("torch.")
