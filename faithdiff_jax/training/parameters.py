"""A run's parameters: read from its model directory, or started anew, and laid out over the mesh.

model directory -> {path: array}, trained in float32 and frozen in the compute dtype
state + frozen  -> {part: nested dict}, for inference
"""

import dataclasses
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from faithdiff_jax.errors import InputError
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import Params, flatten, part_names, part_shapes, unflatten
from faithdiff_jax.sharding import parameter_sharding
from faithdiff_jax.training.config import TrainConfig
from faithdiff_jax.training.lora import adapter_shapes, initial_adapter, merge_adapters
from faithdiff_jax.training.optimizer import Flat
from faithdiff_jax.weights.initialisation import fresh_part
from faithdiff_jax.weights.model_directory import ModelDirectory

NAMED_AT_MOST = 5
GUIDANCE, DECODED = "cond_proj.kernel", "decoder.conv_out."

Shapes = dict[str, tuple[int, ...]]

TEACHER = "teacher."
"""Before the paths of a teacher's own copies of what trains, among the frozen parameters."""


def model_shapes(model: FaithDiffConfig) -> Shapes:
    """Dotted path, part first -> shape, of every parameter of the model."""
    return {f"{part}.{path}": shape for part in part_names(model) for path, shape in part_shapes(model, part).items()}


def trained_shapes(config: TrainConfig, shapes: Shapes, labels: Mapping[str, str]) -> Shapes:
    """Path -> shape of what trains, LoRA's own parameters included."""
    adapters = {} if config.lora is None else adapter_shapes(config.lora, shapes)
    return {path: (shapes | adapters)[path] for path in labels}


def load_parameters(
    config: TrainConfig,
    stored: ModelDirectory,
    model: FaithDiffConfig,
    labels: Mapping[str, str],
    mesh: Mesh,
    *,
    only_frozen: bool = False,
) -> tuple[Flat, Flat]:
    """Read, or start anew, every parameter: (trained, frozen), on the mesh.

    With `only_frozen`, parts that train as a whole are left out: a checkpoint has them.

    Raises:
        InputError: a part of the model directory does not fit the run's architecture, and is not in `fresh`.
    """
    trained: Flat = {}
    frozen: Flat = {}
    for part in part_names(model):
        if only_frozen and all(f"{part}.{path}" in labels for path in part_shapes(model, part)):
            continue
        for path, array in _part(config, stored, model, part, labels, mesh).items():
            if path in labels:
                trained[path] = array
            else:
                frozen[path] = array.astype(config.dtype)
    if config.lora is not None:
        for path, shape in adapter_shapes(config.lora, model_shapes(model)).items():
            key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(path.encode()))
            place = parameter_sharding(mesh, shape)
            trained[path] = jax.jit(initial_adapter, static_argnums=(0, 1), out_shardings=place)(path, shape, key)
    return trained, frozen


def _part(
    config: TrainConfig,
    stored: ModelDirectory,
    model: FaithDiffConfig,
    part: str,
    labels: Mapping[str, str],
    mesh: Mesh,
) -> Flat:
    shapes = part_shapes(model, part)
    sharding = {path: parameter_sharding(mesh, shape) for path, shape in shapes.items()}
    if part not in config.fresh:
        dtype = jnp.float32 if any(f"{part}.{path}" in labels for path in shapes) else jnp.dtype(config.dtype)
        # A weight that the model directory's UNet is not fed is projected by zeros at first.
        new = [path for path in shapes if path.endswith(GUIDANCE) and stored.config.unet.guidance_dim is None]
        known = model if not new else dataclasses.replace(model, unet=stored.config.unet)
        places = {path: place for path, place in sharding.items() if path not in new}
        loaded = flatten(stored.load(part, config=known, dtype=dtype, sharding=places))
        if part == "vae" and model.decoder_output != stored.config.decoder_output:
            # A decoder that is to put out something else puts out nothing at first.
            last = [path for path in shapes if path.startswith(DECODED)]
            if not all(f"{part}.{path}" in labels for path in last):
                output = model.decoder_output
                raise InputError(f"model.decoder_output is {output!r}: needs vae.{DECODED}* in a group, to learn it")
            new += last
        loaded |= {path: _put(np.zeros(shapes[path], dtype), sharding[path]) for path in new}
        return {f"{part}.{path}": array for path, array in loaded.items()}
    fresh = fresh_part(model, part, lambda other: dict(stored.arrays(other)), config.seed)
    return {f"{part}.{path}": _put(array.astype(np.float32), sharding[path]) for path, array in fresh.items()}


def check_finite(arrays: Mapping[str, jax.Array], source: pathlib.Path) -> None:
    """See that no parameter, moment or average holds a NaN or an infinity: no step would ever make it good.

    Args:
        arrays: path -> array, on the mesh.
        source: where they come from, for the message.

    Raises:
        InputError: some do; the first few are named.
    """
    faults = not_finite(arrays)
    if faults:
        raise InputError(f"{source}: NaN or infinite values in {faults}")


def not_finite(arrays: Mapping[str, jax.Array]) -> str:
    """The arrays that hold a NaN or an infinity, the first few by name; "" if there are none.

    A program of its own: inside of the training step it would change how that is fused, and so its last bits.
    """
    floats = {path: array for path, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating)}
    finite = jax.device_get(jax.jit(_finite_each)(floats)) if floats else {}
    paths = [path for path in floats if not finite[path]]
    more = f" and {len(paths) - NAMED_AT_MOST} more" * (len(paths) > NAMED_AT_MOST)
    return ", ".join(paths[:NAMED_AT_MOST]) + more


def _finite_each(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: jnp.all(jnp.isfinite(array)) for path, array in arrays.items()}


def _put(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Lay an array that every process holds out over the mesh."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def inference_params(config: TrainConfig, state: Mapping[str, Any], frozen: Flat) -> dict[str, Params]:
    """The model as it would be exported (its moving average, if there is one), by part and in the compute dtype."""
    trained = state.get("ema", state["trained"])
    cast = {path: array.astype(config.dtype) for path, array in trained.items()}
    own = {path: array for path, array in frozen.items() if not path.startswith(TEACHER)}
    return unflatten(merge_adapters(config.lora, own | cast))
