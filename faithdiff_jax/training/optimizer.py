"""AdamW with a learning rate per parameter group, warm-up, cosine decay and clipping; and the moving average."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from faithdiff_jax.training.config import EMAConfig, GroupConfig, TrainConfig
from faithdiff_jax.training.lora import LORA_GROUP

Flat = dict[str, jax.Array]


def all_groups(config: TrainConfig) -> dict[str, GroupConfig]:
    """The run's groups, including LoRA's."""
    groups = dict(config.groups)
    if config.lora is not None:
        fields = {field.name: getattr(config.lora, field.name) for field in dataclasses.fields(GroupConfig)}
        groups[LORA_GROUP] = GroupConfig(**fields)
    return groups


def learning_rate(config: TrainConfig, group: GroupConfig) -> optax.Schedule:
    """Linear from 0 over `warmup` steps, then half a cosine to 0 at `steps`, or constant."""
    rate, warmup = group.learning_rate, config.optimizer.warmup
    if config.optimizer.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0 if warmup else rate, rate, warmup, config.steps)
    return optax.join_schedules([optax.linear_schedule(0.0, rate, max(warmup, 1)), lambda _: rate], [warmup])


def make_optimizer(config: TrainConfig, labels: Mapping[str, str]) -> optax.GradientTransformation:
    """The optax transformation for a flat dictionary of gradients; `labels` come from `assign_groups`."""
    settings = config.optimizer

    def adamw(group: GroupConfig) -> optax.GradientTransformation:
        return optax.adamw(
            learning_rate(config, group),
            b1=settings.beta1,
            b2=settings.beta2,
            eps=settings.epsilon,
            weight_decay=group.weight_decay,
            mu_dtype=jnp.dtype(settings.momentum_dtype),
        )

    groups = optax.partition({name: adamw(group) for name, group in all_groups(config).items()}, dict(labels))
    clip = optax.identity() if settings.clip is None else optax.clip_by_global_norm(settings.clip)
    return optax.chain(clip, groups)


def group_norms(gradients: Flat, labels: Mapping[str, str]) -> dict[str, Float[Array, ""]]:
    """The global norm of each group's gradients, by group name."""
    return {
        name: optax.tree.norm([gradients[path] for path in gradients if labels[path] == name])
        for name in sorted(set(labels.values()))
    }


def update_average(config: EMAConfig, average: Flat, trained: Flat, step: Int[Array, ""]) -> Flat:
    """The moving average after `step`, counted from 0: short at first, so that it forgets the initial parameters."""
    decay = jnp.minimum(config.decay, (1.0 + step) / (10.0 + step))
    updated: Flat = jax.tree.map(lambda kept, new: kept + (1 - decay) * (new - kept), average, trained)
    return updated
