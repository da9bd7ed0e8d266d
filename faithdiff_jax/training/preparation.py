"""What a run needs before its first parameter is read: everything that can be checked on shapes alone.

TrainConfig, model directory -> architecture, groups, mesh, tokenizers, loader, step, validation
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from faithdiff_jax.data.loader import Loader
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.tokenizers import Tokenizers
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import numbered
from faithdiff_jax.planning import flops
from faithdiff_jax.sharding import batch_sharding, make_mesh
from faithdiff_jax.training.batch import abstract_batch, check_batch, check_memory
from faithdiff_jax.training.config import TrainConfig
from faithdiff_jax.training.distillation import make_step
from faithdiff_jax.training.groups import assign_groups
from faithdiff_jax.training.parameters import Shapes, model_shapes, trained_shapes
from faithdiff_jax.training.run_directory import model_config
from faithdiff_jax.training.step import TrainStep
from faithdiff_jax.training.validation import Validation
from faithdiff_jax.weights.model_directory import ModelDirectory


@dataclasses.dataclass(frozen=True)
class Preparation:
    """A run that is about to read its parameters.

    Attributes:
        stored: the model directory that it starts from.
        shapes: path -> shape of every parameter of the model.
        mesh: the devices.
        loader: this process's share of the data.
        step: the training step, not compiled.
        validation: what is restored on the way, or None.
    """

    stored: ModelDirectory
    shapes: Shapes
    mesh: Mesh
    loader: Loader
    step: TrainStep
    validation: Validation | None


def prepare(config: TrainConfig, model_dir: pathlib.Path) -> Preparation:
    """Check a run against its model directory, its data and the devices, and make what it needs.

    Raises:
        InputError: whatever does not go together, or cannot be opened, or cannot fit.
    """
    stored = ModelDirectory.open(model_dir)
    model = model_config(config, stored)
    shapes = model_shapes(model)
    labels = assign_groups(config, shapes)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    check_batch(config, model, mesh.size, jax.process_count())
    check_memory(config, model, mesh.size, jax.process_count())
    tokenizers = load_tokenizers(model, stored.path)
    loader = open_loader(config, tokenizers)
    step = make_step(config, model, labels, mesh, stored, tokenizers)
    validation = None
    if config.validation is not None:
        validation = Validation(config.validation, model, tokenizers, dtype=jnp.dtype(config.dtype), mesh=mesh)
    return Preparation(stored, shapes, mesh, loader, step, validation)


def open_loader(config: TrainConfig, tokenizers: Tokenizers) -> Loader:
    """This process's share of the data.

    Raises:
        InputError: no sources, or ones that cannot be opened; batches that cannot be shared or do not fit the memory.
    """
    return Loader(
        config.data,
        tokenizers,
        batch=config.batch,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def load_tokenizers(model: FaithDiffConfig, model_dir: pathlib.Path) -> Tokenizers:
    """The model's tokenizers, checked against its text encoders.

    Raises:
        InputError: a tokenizer whose ids its text encoder does not know, or that is of another length.
    """
    names = numbered("tokenizer", len(model.text_encoders))
    tokenizers = Tokenizers.load([model_dir / name for name in names])
    for name, ids, size, encoder in zip(
        names, tokenizers(["a", ""]), tokenizers.vocabulary_sizes, model.text_encoders, strict=True
    ):
        if size > encoder.vocab_size or encoder.end_token not in ids:
            raise InputError(
                f"{model_dir / name}: does not go with its text encoder: {size} tokens for a vocab_size of "
                f"{encoder.vocab_size}, or another end_token than {encoder.end_token}"
            )
        if ids.shape[1] > encoder.positions:
            raise InputError(
                f"{model_dir / name}: gives {ids.shape[1]} tokens, its text encoder has {encoder.positions} positions"
            )
    return tokenizers


def step_flops(step: TrainStep, shapes: Shapes, *, repeated: bool = False) -> float:
    """Model FLOPs of one step: matrix products of loss and gradients.

    With `repeated`, those that rematerialisation computes again are counted again; the step is of one round then.
    """
    config, model = step.config, step.model
    trained = abstract_arrays(trained_shapes(config, shapes, step.labels), jnp.float32)
    frozen = abstract_arrays(step.frozen_shapes(shapes), step.dtype)
    counted = step if repeated else step.without_rematerialisation()
    # FLOPs go with the batch, and a batch of one unit traces faster.
    samples = model.alignment.group or 1
    batch = abstract_batch(config, model, samples)
    one = flops.count(counted.gradients, trained, frozen, batch, jax.ShapeDtypeStruct((), jnp.int32))
    return one / samples * config.batch


def abstract_arrays(shapes: Shapes, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays of one dtype that are shapes only."""
    return {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()}


def placed_batch(batch: Mapping[str, Any], mesh: Mesh, size: int) -> dict[str, jax.Array]:
    """A batch of a loader, each process's part of it where its devices are, with every sample's row in the whole.

    Args:
        batch: arrays of this process's samples.
        mesh: the devices.
        size: samples of all processes together.
    """
    arrays = {name: array for name, array in batch.items() if name != "index"}
    local = len(arrays["hq"])
    arrays["row"] = np.arange(local, dtype=np.int32) + local * jax.process_index()
    sharding = batch_sharding(mesh, size)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in arrays.items()}
