"""Samplers as the papers write them: arrays and a callable that predicts noise, no model.

Every sampler is one `lax.scan` over the steps. `conditions` is any pytree with a leading axis of steps, whose slices
reach `predict_noise(x, condition)`: the timesteps, or time embeddings computed ahead.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from faithdiff_jax.diffusion.schedule import ScheduleConfig, alphas_cumprod, timesteps

PredictNoise = Callable[[jax.Array, Any], jax.Array]


def euler(predict_noise: PredictNoise, latents: jax.Array, sigmas: jax.Array, conditions: Any) -> jax.Array:
    """Follow dx/dsigma = noise from sigmas[0] down to sigmas[-1] (Karras et al. 2022, algorithm 1 without churn).

    Args:
        predict_noise: (x / sqrt(sigma^2 + 1), condition) -> noise, all (B, h, w, c).
        latents: (B, h, w, c), the clean latent plus sigmas[0] times standard normal noise.
        sigmas: (steps + 1,), falling, usually to 0.
        conditions: pytree with a leading axis of steps.

    Returns:
        (B, h, w, c).
    """

    def step(x, now):
        sigma, below, condition = now
        noise = predict_noise(x / jnp.sqrt(sigma**2 + 1), condition)
        return x + (below - sigma) * noise, None

    return jax.lax.scan(step, latents, (sigmas[:-1], sigmas[1:], conditions))[0]


def ddpm(
    predict_noise: PredictNoise,
    latents: jax.Array,
    alphas: tuple[jax.Array, jax.Array],
    step_noise: jax.Array,
    conditions: Any,
) -> jax.Array:
    """Ancestral sampling from the posterior q(x_s | x_t, x_0) (paper, algorithm 2; Ho et al. 2020, equations 6 and 7).

    Args:
        predict_noise: (x, condition) -> noise, all (B, h, w, c).
        latents: (B, h, w, c), of unit variance.
        alphas: cumulative alphas at each step's timestep and at the one it leads to, both (steps,); see `ddpm_alphas`.
        step_noise: (steps, B, h, w, c), standard normal.
        conditions: pytree with a leading axis of steps.

    Returns:
        (B, h, w, c).
    """

    def step(x, now):
        alpha, alpha_below, fresh, condition = now
        noise = predict_noise(x, condition)
        clean = (x - jnp.sqrt(1 - alpha) * noise) / jnp.sqrt(alpha)
        ratio = alpha / alpha_below
        mean = (
            jnp.sqrt(alpha_below) * (1 - ratio) / (1 - alpha) * clean
            + jnp.sqrt(ratio) * (1 - alpha_below) / (1 - alpha) * x
        )
        deviation = jnp.sqrt((1 - alpha_below) / (1 - alpha) * (1 - ratio))
        return mean + deviation * fresh, None

    return jax.lax.scan(step, latents, (*alphas, step_noise, conditions))[0]


def ddpm_alphas(config: ScheduleConfig, steps: int) -> tuple[jax.Array, jax.Array]:
    """Cumulative alphas at `timesteps` and one stride below them (1 below timestep 0), each (steps,)."""
    visited = timesteps(config, steps)
    table = jnp.asarray(alphas_cumprod(config))
    below = visited - config.train_steps // steps
    last = config.train_steps - 1
    return table[visited.clip(max=last)], jnp.where(below < 0, 1.0, table[below.clip(0, last)])


def guide(
    unconditional: jax.Array, conditional: jax.Array, guidance: jax.Array, rescale: jax.Array | None = None
) -> jax.Array:
    """Classifier-free guidance (Ho and Salimans 2022), rescaled if asked (Lin et al. 2024, section 3.4).

    Args:
        unconditional: (B, h, w, c), noise predicted without the caption.
        conditional: (B, h, w, c), noise predicted with it.
        guidance: the weight; 1 is the conditional prediction.
        rescale: phi in 0..1, how far each sample's standard deviation is brought back to the conditional one's.

    Returns:
        (B, h, w, c).
    """
    guided = unconditional + guidance * (conditional - unconditional)
    if rescale is None:
        return guided
    axes = tuple(range(1, guided.ndim))
    ratio = jnp.std(conditional, axis=axes, keepdims=True, ddof=1) / jnp.std(guided, axis=axes, keepdims=True, ddof=1)
    return rescale * guided * ratio + (1 - rescale) * guided
