"""What a FaithDiff is made of, read from its model directory."""

import pathlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from faithdiff_jax.config import from_dict
from faithdiff_jax.errors import InputError, shown
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import Params, part_names, part_shapes, unflatten
from faithdiff_jax.models.quantization import is_quantized, quantize, quantized_shape
from faithdiff_jax.sharding import parameter_sharding
from faithdiff_jax.weights.lora_files import LoRAFile
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.stored_files import CONFIG, section

PRESETS = "presets"
"""Under `restore:` in a model directory's config.yaml, beside its default options."""
DENOISING = ("unet", "alignment")
"""Parts that are at work at every step."""
MODEL_FILE = re.compile(r"config\.yaml|\w+\.safetensors|tokenizer(_\d+)?/[^/]+")


def default_options(stored: ModelDirectory) -> RestoreOptions:
    """A model directory's own default options: the published ones, with what `restore:` in its config.yaml says.

    Raises:
        InputError: an unknown option, or a value outside its range.
    """
    return from_dict(RestoreOptions, _plain(stored), f"{stored.path / CONFIG}: restore")


def preset_options(stored: ModelDirectory) -> dict[str, RestoreOptions]:
    """Name -> options of each of a model directory's presets: its defaults, with what `presets:` there changes.

    Raises:
        InputError: presets that are no section of sections, an unknown option, or a value outside its range.
    """
    source = f"{stored.path / CONFIG}: restore"
    presets = section(stored.defaults, PRESETS, source, optional=True)
    return {
        name: from_dict(RestoreOptions, {**_plain(stored), **section(presets, name, f"{source}.{PRESETS}")}, source)
        for name in presets
    }


def chosen(presets: Mapping[str, RestoreOptions], name: str) -> RestoreOptions:
    """The preset of that name.

    Raises:
        InputError: there is none, with the names that there are.
    """
    if name not in presets:
        known = f"its presets: {', '.join(presets)}" if presets else "it has no presets"
        raise InputError(f"unknown preset {shown(name)} of this model ({known})")
    return presets[name]


def _plain(stored: ModelDirectory) -> dict[str, Any]:
    return {name: value for name, value in stored.defaults.items() if name != PRESETS}


def open_loras(files: Mapping[str, float], stored: ModelDirectory) -> list[tuple[LoRAFile, float]]:
    """LoRA files, each with its weight.

    Raises:
        InputError: a file that cannot be read, or is for another model.
    """
    return [(LoRAFile.open(pathlib.Path(file), stored.config), weight) for file, weight in files.items()]


def load_parameters(
    stored: ModelDirectory,
    dtype: Any,
    mesh: Mesh | None,
    loras: Sequence[tuple[LoRAFile, float]] = (),
    quantized: str | None = None,
    *,
    offload: bool = False,
) -> dict[str, Params]:
    """Part name -> its parameters, in `dtype`, spread over the mesh if there is one.

    LoRA is added, and kernels are brought into 8 bits, as they are read. With `offload`, parts that do not denoise are
    NumPy arrays: a program brings them to its devices, and they are gone from there when it is done.

    Raises:
        InputError: parameters that do not fit the configuration.
    """
    params = {}
    for part in part_names(stored.config):
        sharding = None
        if mesh is not None:
            shapes = part_shapes(stored.config, part)
            sharding = {name: parameter_sharding(mesh, shape) for name, shape in shapes.items()}

        def finish(path: str, array: jax.Array, part: str = part) -> Any:
            for lora, weight in loras:
                array = lora.added(part, path, array, weight)
            if quantized is not None and is_quantized(part, path, array.shape):
                return quantize(array, quantized)
            return array

        params[part] = stored.load(part, dtype=dtype, sharding=sharding, finish=finish)
        if offload and part not in DENOISING:
            params[part] = jax.tree.map(np.asarray, params[part])
    return params


def shaped_parameters(
    config: FaithDiffConfig, part: str, dtype: Any, shaped: Callable[..., Any], quantized: str | None = None
) -> Params:
    """A part's parameters as shapes, each made by `shaped(shape, dtype)`; laid out as `load_parameters` gives them."""

    def parameter(path: str, shape: tuple[int, ...]) -> Any:
        if quantized is not None and is_quantized(part, path, shape):
            return quantized_shape(shape, quantized, dtype, shaped)
        return shaped(shape, dtype)

    return unflatten({path: parameter(path, shape) for path, shape in part_shapes(config, part).items()})


def model_files(names: Collection[str]) -> list[str]:
    """What of a repository is fetched: the files of a model directory."""
    return [name for name in names if MODEL_FILE.fullmatch(name)]
