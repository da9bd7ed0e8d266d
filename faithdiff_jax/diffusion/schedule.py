"""The noise schedule: betas, cumulative alphas, the sigmas and timesteps of a sampler, and the forward process."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Scaled-linear betas over `train_steps`; the defaults are SDXL's. The model predicts the noise (epsilon)."""

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps_offset: int = 1

    def __post_init__(self):
        if self.train_steps < 1:
            raise ValueError(f"train_steps is {self.train_steps}: must be at least 1")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start is {self.beta_start} and beta_end {self.beta_end}: must rise and lie between 0 and 1"
            )


def alphas_cumprod(config: ScheduleConfig) -> np.ndarray:
    """(train_steps,) float32: the share of the clean signal's variance left at each timestep."""
    betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.train_steps, dtype=np.float32) ** 2
    return np.cumprod(1.0 - betas, dtype=np.float32)


def timesteps(config: ScheduleConfig, steps: int) -> np.ndarray:
    """(steps,) int32, falling: "leading" spacing, 951, 901, ... 1 for 20 steps of 1000.

    With as many steps as training has, the offset leads one past the last timestep; the published sampler lets it,
    and takes the last timestep's noise level there.

    Raises:
        ValueError: steps below 1 or above `train_steps`.
    """
    if not 1 <= steps <= config.train_steps:
        raise ValueError(f"steps is {steps}: must be between 1 and {config.train_steps}")
    spacing = config.train_steps // steps
    return (np.arange(steps - 1, -1, -1) * spacing + config.steps_offset).astype(np.int32)


def sigmas(config: ScheduleConfig, steps: int) -> np.ndarray:
    """(steps + 1,) float32: noise over signal, sqrt((1 - a) / a), at each of `timesteps`, then 0.

    Source: Karras et al. 2022 (EDM) in the form of k-diffusion, which the published sampler uses.
    """
    alphas = alphas_cumprod(config)
    levels = ((1 - alphas) / alphas) ** 0.5
    visited = np.minimum(timesteps(config, steps), config.train_steps - 1)
    return np.append(levels[visited], 0).astype(np.float32)


def init_noise_sigma(config: ScheduleConfig, steps: int) -> float:
    """What standard normal noise is multiplied by at the start of Euler sampling: sqrt(sigma_max^2 + 1)."""
    return float((sigmas(config, steps)[0] ** 2 + 1) ** 0.5)


def add_noise(config: ScheduleConfig, latents: jax.Array, noise: jax.Array, timestep: jax.Array | int) -> jax.Array:
    """The forward process q(x_t | x_0): sqrt(a_t) * latents + sqrt(1 - a_t) * noise (paper, equation 2).

    Args:
        config: the schedule.
        latents: (B, h, w, c), scaled.
        noise: (B, h, w, c).
        timestep: one timestep, or (B,), in 0..train_steps - 1.

    Returns:
        (B, h, w, c).
    """
    alpha = jnp.asarray(alphas_cumprod(config))[timestep]
    alpha = jnp.reshape(alpha, (-1, 1, 1, 1))
    return jnp.sqrt(alpha) * latents + jnp.sqrt(1 - alpha) * noise
