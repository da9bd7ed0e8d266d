"""What a FaithDiff is made of, read from its model directory."""

import re
from collections.abc import Collection
from typing import Any

from jax.sharding import Mesh

from faithdiff_jax.config import from_dict
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.models.parts import Params, part_names, part_shapes
from faithdiff_jax.sharding import parameter_sharding
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.stored_files import CONFIG

MODEL_FILE = re.compile(r"config\.yaml|\w+\.safetensors|tokenizer(_\d+)?/[^/]+")


def default_options(stored: ModelDirectory) -> RestoreOptions:
    """A model directory's own default options: the published ones, with what `restore:` in its config.yaml says.

    Raises:
        InputError: an unknown option, or a value outside its range.
    """
    return from_dict(RestoreOptions, stored.defaults, f"{stored.path / CONFIG}: restore")


def load_parameters(stored: ModelDirectory, dtype: Any, mesh: Mesh | None) -> dict[str, Params]:
    """Part name -> its parameters, in `dtype`, spread over the mesh if there is one.

    Raises:
        InputError: parameters that do not fit the configuration.
    """
    params = {}
    for part in part_names(stored.config):
        sharding = None
        if mesh is not None:
            shapes = part_shapes(stored.config, part)
            sharding = {name: parameter_sharding(mesh, shape) for name, shape in shapes.items()}
        params[part] = stored.load(part, dtype=dtype, sharding=sharding)
    return params


def model_files(names: Collection[str]) -> list[str]:
    """What of a repository is fetched: the files of a model directory."""
    return [name for name in names if MODEL_FILE.fullmatch(name)]
