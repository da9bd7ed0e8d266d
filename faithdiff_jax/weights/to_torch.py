"""Model directory -> the published layout, for the PyTorch code."""

import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.writing import refuse_existing, whole
from faithdiff_jax.models.parts import part_shapes
from faithdiff_jax.weights import rules
from faithdiff_jax.weights.from_torch import Track, untracked
from faithdiff_jax.weights.keymap import Entry, KeyMap, compare
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.safetensors_format import Spec, write_tensors
from faithdiff_jax.weights.stored_files import CONFIG

Writer = Callable[[pathlib.Path, Mapping[str, Spec], Iterable[tuple[str, np.ndarray]]], object]


def to_torch(model_dir: pathlib.Path | str, output: pathlib.Path | str, track: Track = untracked) -> None:
    """Write what a model learned as one state dict in the published layout, each tensor in its stored dtype.

    Of FaithDiff that is LQ encoder, aligner and UNet; of a baseline the network that steers the UNet.

    Args:
        model_dir: a model directory.
        output: a `.safetensors` file, written tensor by tensor; or with torch installed a `.bin`, whose tensors are
            in memory all at once. It must not exist.
        track: shows progress.

    Raises:
        InputError: not a model directory, a damaged one, one of an architecture that the published layout does not
            have, or an output that exists or is of another kind.
    """
    output = pathlib.Path(output)
    write = state_dict_writer(output, ".bin")
    model = ModelDirectory.open(model_dir)
    config = model.config
    try:
        published = rules.published_parts(config)
    except InputError as error:
        raise InputError(f"{model_dir}: {error}") from None
    refuse_existing(output)

    keymaps: dict[str, KeyMap] = {}
    dtypes: dict[str, dict[str, np.dtype]] = {}
    for part in published:
        stored = model.specs(part)
        shapes = part_shapes(config, part)
        faults = compare(shapes, {path: shape for path, (_, shape) in stored.items()})
        if faults:
            raise InputError(f"{model_dir}: {part}.safetensors does not fit {CONFIG}: {'; '.join(faults)}")
        keymaps[part] = KeyMap(published[part], shapes)
        dtypes[part] = {path: dtype for path, (dtype, _) in stored.items()}

    # Wider numbers first: so every tensor is aligned in the file.
    runs: list[tuple[str, list[Entry]]] = []
    for size in sorted({dtype.itemsize for part in dtypes.values() for dtype in part.values()}, reverse=True):
        for part, keymap in keymaps.items():
            runs.append((part, [entry for entry in keymap.entries if dtypes[part][entry.path].itemsize == size]))
    specs = {
        name: (dtypes[part][entry.path], entry.published_shape)
        for part, entries in runs
        for entry in entries
        for name in entry.published
    }

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for part, entries in runs:
            arrays = model.arrays(part, [entry.path for entry in entries])
            for entry, (_, array) in zip(entries, arrays, strict=True):
                yield from keymaps[part].write(entry, array)

    with whole(output, sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())) as target:
        write(target, specs, track(tensors(), output.name, len(specs)))


def state_dict_writer(output: pathlib.Path, torch_suffix: str, under: str | None = None) -> Writer:
    """What writes a state dict to a file of this name.

    Args:
        output: a `.safetensors` file, or one of torch.
        torch_suffix: of files that torch.save writes.
        under: the key of the dictionary that such a file keeps the state dict under; None for the state dict itself.

    Raises:
        InputError: a file of another kind, or one of torch where there is none.
    """
    if output.suffix == ".safetensors":
        return write_tensors
    if output.suffix != torch_suffix:
        raise InputError(f"{output}: the file's name must end in .safetensors or {torch_suffix}")
    try:
        import torch
    except ImportError:
        raise InputError(f"{output}: a {torch_suffix} needs PyTorch: pip install 'faithdiff-jax[torch]'") from None

    def write(path: pathlib.Path, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
        state = {}
        for name, array in tensors:
            if array.dtype == ml_dtypes.bfloat16:  # torch does not know NumPy's
                state[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            else:
                state[name] = torch.from_numpy(array)
        torch.save(state if under is None else {under: state}, path)

    return write
