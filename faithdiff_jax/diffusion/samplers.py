"""Samplers as the papers write them, by name; and guidance. Those that use earlier predictions are in `multistep`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from faithdiff_jax.diffusion import names, schedule
from faithdiff_jax.diffusion.multistep import DPMSolver2M, UniPC
from faithdiff_jax.diffusion.sampler import Carry, Fresh, Predict, Sampler


@dataclasses.dataclass(frozen=True)
class Euler(Sampler):
    """Follow dx/dsigma = noise from the largest sigma down to 0 (Karras et al. 2022, algorithm 1 without churn)."""

    @property
    def init_noise_scale(self) -> float:
        """sqrt(sigma_max^2 + 1), as published."""
        return float((self.sigmas()[0] ** 2 + 1) ** 0.5)

    def coefficients(self) -> tuple[Float[Array, " steps"], Float[Array, " steps"]]:
        """Each step's sigma, and the one below."""
        sigmas = jnp.asarray(self.sigmas())
        return sigmas[:-1], sigmas[1:]

    def step(self, predict: Predict, carry: Carry, coefficients: Any, fresh: Fresh) -> Carry:
        """As in `Sampler`."""
        x, (sigma, below) = carry.latents, coefficients
        noise, memory = predict(x / jnp.sqrt(sigma**2 + 1))
        return Carry(x + (below - sigma) * noise, None, memory)


@dataclasses.dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling from the posterior q(x_s | x_t, x_0) (paper, algorithm 2; Ho et al. 2020, equations 6, 7)."""

    needs_step_noise = True

    def coefficients(self) -> tuple[Float[Array, " steps"], Float[Array, " steps"]]:
        """Cumulative alphas at each of `timesteps`, and at the one below: one stride below by default, 1 below 0."""
        visited = self.timesteps()
        below = visited - self.schedule.train_steps // self.steps
        if self.visited is not None:
            below = np.append(visited[1:], -1)
        return jnp.asarray(self.alphas()), jnp.where(below < 0, 1.0, schedule.alphas_at(self.schedule, below.clip(0)))

    def step(self, predict: Predict, carry: Carry, coefficients: Any, fresh: Fresh) -> Carry:
        """As in `Sampler`."""
        x, (alpha, alpha_below) = carry.latents, coefficients
        noise, memory = predict(x)
        clean = (x - jnp.sqrt(1 - alpha) * noise) / jnp.sqrt(alpha)
        ratio = alpha / alpha_below
        mean = (
            jnp.sqrt(alpha_below) * (1 - ratio) / (1 - alpha) * clean
            + jnp.sqrt(ratio) * (1 - alpha_below) / (1 - alpha) * x
        )
        deviation = jnp.sqrt((1 - alpha_below) / (1 - alpha) * (1 - ratio))
        return Carry(mean + deviation * jnp.asarray(fresh), None, memory)


SAMPLERS: Mapping[str, type[Sampler]] = dict(zip(names.SAMPLERS, (Euler, DDPM, DPMSolver2M, UniPC), strict=True))
"""By the names that options have."""


def guide(
    unconditional: Float[Array, "b h w c"],
    conditional: Float[Array, "b h w c"],
    guidance: Float[Array, ""] | Float[Array, "b 1 1 1"] | float,
    rescale: Float[Array, ""] | float | None = None,
) -> Float[Array, "b h w c"]:
    """Classifier-free guidance (Ho and Salimans 2022), rescaled if asked (Lin et al. 2024, section 3.4).

    Args:
        unconditional: noise predicted without the caption.
        conditional: noise predicted with it.
        guidance: the weight, or one for each sample; 1 is the conditional prediction.
        rescale: phi in 0..1, how far each sample's standard deviation is brought back to the conditional one's.
    """
    guided = unconditional + guidance * (conditional - unconditional)
    if rescale is None:
        return guided
    axes = tuple(range(1, guided.ndim))
    ratio = jnp.std(conditional, axis=axes, keepdims=True, ddof=1) / jnp.std(guided, axis=axes, keepdims=True, ddof=1)
    return rescale * guided * ratio + (1 - rescale) * guided
