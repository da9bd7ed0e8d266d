"""AdamW with a learning rate per parameter group, warm-up, cosine decay and clipping; and the moving average."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from faithdiff_jax.training.config import EMAConfig, GroupConfig, TrainConfig
from faithdiff_jax.training.eight_bit import scale_by_adam_in_8_bits
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

    betas = settings.beta1, settings.beta2, settings.epsilon
    if settings.momentum_dtype == "int8":
        scale_by_adam = scale_by_adam_in_8_bits(*betas)
    else:
        scale_by_adam = optax.scale_by_adam(*betas, mu_dtype=jnp.dtype(settings.momentum_dtype))

    def adamw(group: GroupConfig) -> optax.GradientTransformation:
        decay, rate = optax.add_decayed_weights(group.weight_decay), learning_rate(config, group)
        return optax.chain(scale_by_adam, decay, optax.scale_by_learning_rate(rate))

    groups = optax.partition({name: adamw(group) for name, group in all_groups(config).items()}, dict(labels))
    clip = optax.identity() if settings.clip is None else optax.clip_by_global_norm(settings.clip)
    return optax.chain(clip, groups)


def group_norms(gradients: Flat, labels: Mapping[str, str]) -> dict[str, Float[Array, ""]]:
    """The global norm of each group's gradients, by group name."""
    return {
        name: optax.tree.norm([gradients[path] for path in gradients if labels[path] == name])
        for name in sorted(set(labels.values()))
    }


def update_average(
    config: EMAConfig, average: Flat, trained: Flat, step: Int[Array, ""], finite: Bool[Array, ""]
) -> Flat:
    """The moving average after `step`, counted from 0: short at first, so that it forgets the initial parameters.

    It stays what it was after a step that was not `finite`, and between the steps that `config.every` names.
    """
    decay = jnp.minimum(config.decay, (1.0 + step) / (10.0 + step))
    if config.every > 1:
        decay **= config.every

    def updated() -> Flat:
        return {path: kept + (1 - decay) * (trained[path] - kept) for path, kept in average.items()}

    if config.every == 1:
        return {path: jnp.where(finite, after, average[path]) for path, after in updated().items()}
    due = finite & ((step + 1) % config.every == 0)
    # A branch, since a selection would read and write both.
    result: Flat = jax.lax.cond(due, updated, lambda: average)
    return result
