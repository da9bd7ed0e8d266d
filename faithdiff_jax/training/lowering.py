"""The training step of a configuration as a program for devices that are not there: shapes only, no memory.

TrainConfig, mesh --shapes laid out over it--> lowered step, and what its state takes on each device
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from faithdiff_jax.config import from_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.models.backend import trace_for
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.sharding import BATCH_AXES, batch_sharding, bytes_on_device, mesh_sides, placed_shapes
from faithdiff_jax.training.batch import abstract_batch, check_batch
from faithdiff_jax.training.config import TrainConfig
from faithdiff_jax.training.distillation import DistillStep, Teacher, teacher_options
from faithdiff_jax.training.groups import assign_groups
from faithdiff_jax.training.parameters import Shapes, model_shapes, trained_shapes
from faithdiff_jax.training.preparation import abstract_arrays, step_flops
from faithdiff_jax.training.step import TrainStep


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """A run's step before there are devices, data or a model directory.

    Attributes:
        config: the run.
        model: its architecture.
        shapes: path -> shape of every parameter of the model.
        labels: path -> group of what trains.
    """

    config: TrainConfig
    model: FaithDiffConfig
    shapes: Shapes
    labels: Mapping[str, str]

    @classmethod
    def of(cls, config: TrainConfig, model: FaithDiffConfig | None = None) -> "PlannedStep":
        """The step of a configuration, of the published model with the changes it has under `model`, or of another."""
        model = from_dict(FaithDiffConfig, config.model, "model") if model is None else model
        shapes = model_shapes(model)
        return cls(config, model, shapes, assign_groups(config, shapes))

    @property
    def trained(self) -> Shapes:
        """Path -> shape of what trains."""
        return trained_shapes(self.config, self.shapes, self.labels)

    def step(self, mesh: Mesh | None) -> TrainStep:
        """As a run makes it; a teacher is the published model, with the published defaults."""
        if self.config.distill is None:
            return TrainStep(self.config, self.model, self.labels, mesh)
        published = FaithDiffConfig()
        negative_ids = tuple(np.zeros((1, encoder.positions), np.int32) for encoder in published.text_encoders)
        teacher = Teacher(published, teacher_options(self.config.distill, RestoreOptions()), negative_ids)
        return DistillStep(self.config, self.model, self.labels, mesh, teacher)

    def model_flops(self) -> float:
        """FLOPs of a step over the whole batch that the model needs; nothing is compiled."""
        return step_flops(self.step(None), self.shapes)

    def all_flops(self) -> float:
        """The same with what rematerialisation computes again."""
        one_round = dataclasses.replace(self.config, accumulation=1)
        return step_flops(dataclasses.replace(self, config=one_round).step(None), self.shapes, repeated=True)

    def lower(self, mesh: Mesh) -> tuple[jax.stages.Lowered, dict[str, int]]:
        """The step traced and lowered for a TPU's mesh, and bytes of its arguments on each device, by what they are.

        Raises:
            InputError: a batch that does not divide over the devices.
        """
        check_batch(self.config, self.model, mesh.size, 1)
        step = self.step(mesh)
        state, frozen, batch = self._arguments(step)
        rows = batch_sharding(mesh, self.config.batch)
        state, frozen = (placed_shapes(tree, step.shardings(tree)) for tree in (state, frozen))
        batch = placed_shapes(batch, jax.tree.map(lambda leaf: rows, batch))
        held = {name: bytes_on_device(state[name]) for name in ("trained", "optimizer", "ema") if name in state}
        held |= {"frozen": bytes_on_device(frozen), "batch": bytes_on_device(batch)}
        with trace_for("tpu"):
            return step.run.lower(state, frozen, batch), held

    def _arguments(self, step: TrainStep) -> tuple[Any, Any, Any]:
        """State, frozen parameters and batch, as shapes."""
        masters = abstract_arrays(self.trained, jnp.float32)
        frozen = abstract_arrays(step.frozen_shapes(self.shapes), step.dtype)
        batch = abstract_batch(step.config, self.model, step.config.batch)
        return jax.eval_shape(step.init, masters), frozen, batch


def advice(config: TrainConfig, mesh: tuple[int, int], held: int, temporary: int) -> str:
    """What to change first where a step does not fit: what saves most and costs least time.

    Args:
        config: the run.
        mesh: its sides, data and fsdp.
        held: bytes on each device of the state and the rest that stays.
        temporary: bytes of all else.
    """
    data, fsdp = mesh
    samples = config.batch // (data * fsdp * config.accumulation)
    if temporary >= held:
        if config.rematerialisation != "full":
            return "rematerialisation=full computes activations again instead of keeping them"
        if samples > 1:
            return f"accumulation={2 * config.accumulation} halves the samples that are on a chip at once"
    if data > 1:
        return f"mesh.data=1 mesh.fsdp={data * fsdp} splits parameters and optimiser state over all chips"
    if samples > 1:
        return f"accumulation={2 * config.accumulation} halves the samples that are on a chip at once"
    if config.optimizer.momentum_dtype == "float32":
        return "optimizer.momentum_dtype=int8 saves six bytes a trained parameter"
    if config.ema is not None:
        return "ema=null saves four bytes a trained parameter"
    return "more chips, or --config lora, which trains less"


def mesh_over(config: TrainConfig, devices: np.ndarray) -> Mesh:
    """The configuration's mesh over given devices.

    Raises:
        InputError: its sides do not multiply to their number.
    """
    sides, count = mesh_sides(config.mesh.data, config.mesh.fsdp, len(devices)), len(devices)
    if math.prod(sides) != count or min(sides) < 1:
        raise InputError(
            f"mesh is {config.mesh.data} x {config.mesh.fsdp} (mesh.data x mesh.fsdp): must multiply to {count} chips"
        )
    return Mesh(devices.reshape(sides), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)
