"""The smallest model that has everything a training step goes through, and steps on it; no torch."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from tiny import TOKENIZER_VOCAB_SIZE

from faithdiff_jax.config import from_dict
from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.clip import TextEncoderConfig
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.unet_config import UNetConfig
from faithdiff_jax.models.vae import VAEConfig
from faithdiff_jax.sharding import batch_sharding
from faithdiff_jax.training.config import TrainConfig
from faithdiff_jax.training.groups import assign_groups
from faithdiff_jax.training.lora import PREFIX
from faithdiff_jax.training.parameters import model_shapes, trained_shapes
from faithdiff_jax.training.step import State, TrainStep

END_TOKEN = TOKENIZER_VOCAB_SIZE - 1
VAE_CHANNELS = (8, 32)
GROUPS = 8
TEXT_WIDTH, POOLED, TIME_IDS = 8, 12, 8
FACTOR = 2 ** (len(VAE_CHANNELS) - 1)
SIZE = (12, 20)  # of the training images: latents of 6 x 10, whose half is odd
BATCH = 8

STAGE_1 = {
    "groups": {"alignment": {"parameters": ["alignment.*"], "learning_rate": 2e-3}},
    "frozen": ["unet.*", "lq_encoder.*", "vae.*", "text_encoder*"],
}
STAGE_2 = {
    "groups": {
        "lq_encoder": {"parameters": ["lq_encoder.*"], "learning_rate": 1e-3},
        "rest": {"parameters": ["alignment.*", "unet.*"], "learning_rate": 2e-3},
    },
    "frozen": ["vae.*", "text_encoder*"],
}


def model_config(
    mixing: str = "none", group: int | None = None, widths: tuple[int, ...] = (16,), resnets: int = 1
) -> FaithDiffConfig:
    """One ResNet block a level or more, stacks of two transformer blocks at the coarsest level alone."""
    text = {"vocab_size": TOKENIZER_VOCAB_SIZE, "width": TEXT_WIDTH, "layers": 2, "heads": 2, "end_token": END_TOKEN}
    levels = len(widths)
    return FaithDiffConfig(
        unet=UNetConfig(
            channels=widths,
            resnets_per_level=resnets,
            transformer_depth=(0,) * (levels - 1) + (2,),
            mid_transformer_depth=2,
            heads=(2,) * levels,
            context_dim=2 * TEXT_WIDTH,
            pooled_dim=POOLED,
            time_id_dim=TIME_IDS,
            norm_groups=GROUPS,
        ),
        vae=VAEConfig(channels=VAE_CHANNELS, resnets_per_level=1, norm_groups=GROUPS),
        alignment=AlignmentConfig(mixing=mixing, group=group),
        text_encoders=(
            TextEncoderConfig(**text, mlp_width=2 * TEXT_WIDTH),
            TextEncoderConfig(**text, mlp_width=2 * TEXT_WIDTH, activation="gelu", projection=POOLED),
        ),
    )


def train_config(stage: Mapping[str, Any], **changes: Any) -> TrainConfig:
    """A stage at full precision with rates that do something at once; `changes` are keys of TrainConfig."""
    plain = {"steps": 8, "batch": BATCH, "dtype": "float32", "optimizer": {"warmup": 0, "clip": 0.25}}
    return from_dict(TrainConfig, {**plain, **stage, **changes}, "test")


def make_step(config: TrainConfig, model: FaithDiffConfig, mesh: Mesh | None = None) -> TrainStep:
    return TrainStep(config, model, assign_groups(config, model_shapes(model)), mesh)


def make_mesh(data: int, fsdp: int) -> Mesh:
    """A mesh over as many of the simulated devices as it needs."""
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


@functools.cache
def parameters(model: FaithDiffConfig) -> dict[str, np.ndarray]:
    """Random float32 numbers for every parameter, zero-initialised layers included; read only."""
    rng = np.random.default_rng(0)
    arrays = {}
    for path, shape in model_shapes(model).items():
        values = rng.standard_normal(shape, np.float32)
        if path.endswith((".kernel", ".embedding")):
            # The leading axis of a stack is no input.
            inputs = np.prod(shape[:-1]) / (shape[0] if ".blocks." in path and len(shape) == 3 else 1)
            arrays[path] = values * np.float32(inputs**-0.5)
        else:
            arrays[path] = 0.1 * values + np.float32(path.endswith(".scale"))
        arrays[path].setflags(write=False)
    return arrays


def start(step: TrainStep, arrays: Mapping[str, np.ndarray] | None = None) -> tuple[State, dict[str, jax.Array]]:
    """The state before the first step and the frozen parameters, where the step's mesh has them."""
    arrays = parameters(step.model) if arrays is None else arrays
    wanted = trained_shapes(step.config, model_shapes(step.model), step.labels)
    trained = {path: arrays[path] if path in arrays else adapter(path, shape) for path, shape in wanted.items()}
    frozen = {path: jnp.asarray(array, step.dtype) for path, array in arrays.items() if path not in trained}
    if step.mesh is None:
        return jax.jit(step.init)(jax.tree.map(jnp.array, trained)), frozen
    trained = jax.device_put(trained, step.shardings(trained))
    places = step.shardings(jax.eval_shape(step.init, trained))
    return jax.jit(step.init, out_shardings=places)(trained), jax.device_put(frozen, step.shardings(frozen))


def adapter(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """LoRA's A random and its B zero."""
    assert path.startswith(PREFIX)
    rng = np.random.default_rng(len(path))
    return rng.standard_normal(shape, np.float32) * np.float32(path.endswith(".a"))


def make_batch(seed: int, samples: int = BATCH, *, given: bool = True) -> dict[str, np.ndarray]:
    """A batch for `TrainStep.run`; with `given`, what the step would draw as well."""
    rng = np.random.default_rng(seed)
    latent = (samples, *(side // FACTOR for side in SIZE), 4)
    batch: dict[str, np.ndarray] = {
        name: rng.uniform(-1, 1, (samples, *SIZE, 3)).astype(np.float32) for name in ("hq", "lq")
    }
    batch["time_ids"] = rng.integers(0, 100, (samples, 6)).astype(np.float32)
    batch["row"] = np.arange(samples, dtype=np.int32)
    for i in range(2):
        ids = rng.integers(0, END_TOKEN, (samples, 77)).astype(np.int32)
        ids[np.arange(samples), rng.integers(1, 77, samples)] = END_TOKEN
        batch[f"token_ids_{i}"] = ids
    if given:
        batch["timesteps"] = rng.integers(0, 1000, samples).astype(np.int32)
        batch["noise"] = rng.standard_normal(latent, np.float32)
        batch["vae_noise"] = rng.standard_normal(latent, np.float32)
    return batch


def placed(batch: Mapping[str, np.ndarray], mesh: Mesh | None) -> dict[str, jax.Array]:
    """The batch as the loop hands it over: split over the mesh."""
    if mesh is None:
        return {name: jnp.asarray(array) for name, array in batch.items()}
    return {name: jax.device_put(array, batch_sharding(mesh, len(array))) for name, array in batch.items()}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What some steps did, on the host."""

    losses: tuple[np.ndarray, ...]
    """Of each step, a loss for every sample."""
    metrics: tuple[dict[str, Any], ...]
    state: State
    compiled: int
    """How often the step was compiled for them: once, or not at all where it was before."""


def run(step: TrainStep, batches: list[dict[str, np.ndarray]]) -> Outcome:
    """One step on each batch, from the same start each time."""
    state, frozen = start(step)
    metrics, compiled = [], []

    def note(event: str, seconds: float, **about: Any) -> None:
        if event.endswith("backend_compile_duration") and "update" in about["fun_name"]:
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for batch in batches:
            state, values = step.run(state, frozen, placed(batch, step.mesh))
            metrics.append(jax.device_get(values))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    losses = tuple(values["losses"] for values in metrics)
    return Outcome(losses, tuple(metrics), jax.device_get(state), len(compiled))
