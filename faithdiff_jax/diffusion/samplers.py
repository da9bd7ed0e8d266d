"""Samplers as the papers write them: objects that know arrays and a callable that predicts noise, never models.

A sampler is a frozen dataclass of a schedule and a number of steps: hashable, so that it is static under jit. It walks
down its timesteps in one `lax.scan`; what a multistep sampler remembers belongs into the scan's carry.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from faithdiff_jax.diffusion import names, schedule
from faithdiff_jax.diffusion.schedule import ScheduleConfig

PredictNoise = Callable[[jax.Array, Any], jax.Array]
"""(x, condition) -> noise: x is (B, h, w, c) of unit variance, sqrt(a) * clean + sqrt(1 - a) * noise."""
Remembers = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]
"""(x, condition, memory) -> noise, memory: the same for a callable that takes something from step to step."""


@dataclasses.dataclass(frozen=True)
class Sampler(abc.ABC):
    """What every sampler offers; made by `SAMPLERS[name](schedule, steps)`.

    Attributes:
        schedule: the noise schedule.
        steps: evaluations of the model, 1 to `schedule.train_steps`.
        needs_step_noise: whether fresh noise is added at every step.
    """

    schedule: ScheduleConfig
    steps: int

    needs_step_noise: ClassVar[bool]

    @property
    @abc.abstractmethod
    def init_noise_scale(self) -> float:
        """What standard normal noise is multiplied by to start from."""

    def timesteps(self) -> Int[np.ndarray, " steps"]:
        """The timesteps at which noise is predicted, falling; as in `schedule.timesteps`."""
        return schedule.timesteps(self.schedule, self.steps)

    def sample(
        self,
        predict_noise: PredictNoise,
        latents: Float[Array, "b h w c"],
        conditions: Any,
        step_noise: Float[Array, "steps b h w c"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """Walk from the start point to a clean latent.

        Args:
            predict_noise: the model.
            latents: the start point: standard normal noise times `init_noise_scale`, plus the scaled latent of the LQ
                image if the walk starts from there.
            conditions: any pytree with a leading axis of steps; its slices reach `predict_noise`.
            step_noise: standard normal, where `needs_step_noise`.
        """

        def predict(x: Array, condition: Any, memory: None) -> tuple[Array, None]:
            return predict_noise(x, condition), memory

        return self.walk(predict, latents, conditions, step_noise, None)[0]

    @abc.abstractmethod
    def walk(
        self,
        predict_noise: Remembers,
        latents: Float[Array, "b h w c"],
        conditions: Any,
        step_noise: Float[Array, "steps b h w c"] | None,
        memory: Any,
    ) -> tuple[Float[Array, "b h w c"], Any]:
        """`sample` with what the model remembers: a pytree of fixed shapes, as at the start -> as after the last step.

        With None it is the program of `sample`.
        """


@dataclasses.dataclass(frozen=True)
class Euler(Sampler):
    """Follow dx/dsigma = noise from the largest sigma down to 0 (Karras et al. 2022, algorithm 1 without churn)."""

    needs_step_noise = False

    @property
    def init_noise_scale(self) -> float:
        """sqrt(sigma_max^2 + 1), as published."""
        return schedule.init_noise_sigma(self.schedule, self.steps)

    def sigmas(self) -> Float[np.ndarray, " levels"]:
        """(steps + 1,) noise over signal at each of `timesteps`, then 0."""
        return schedule.sigmas(self.schedule, self.steps)

    def walk(
        self,
        predict_noise: Remembers,
        latents: Float[Array, "b h w c"],
        conditions: Any,
        step_noise: Float[Array, "steps b h w c"] | None,
        memory: Any,
    ) -> tuple[Float[Array, "b h w c"], Any]:
        """As in `Sampler`; `step_noise` is not used."""
        sigmas = jnp.asarray(self.sigmas())

        def step(carry: tuple[Array, Any], now: tuple[Any, ...]) -> tuple[tuple[Array, Any], None]:
            (x, memory), (sigma, below, condition) = carry, now
            noise, memory = predict_noise(x / jnp.sqrt(sigma**2 + 1), condition, memory)
            return (x + (below - sigma) * noise, memory), None

        return jax.lax.scan(step, (latents, memory), (sigmas[:-1], sigmas[1:], conditions))[0]


@dataclasses.dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling from the posterior q(x_s | x_t, x_0) (paper, algorithm 2; Ho et al. 2020, equations 6, 7)."""

    needs_step_noise = True

    @property
    def init_noise_scale(self) -> float:
        """1, since what it walks on has unit variance."""
        return 1.0

    def alphas(self) -> tuple[Float[Array, " steps"], Float[Array, " steps"]]:
        """Cumulative alphas at each of `timesteps`, and one stride below (1 below timestep 0)."""
        visited = self.timesteps()
        table = jnp.asarray(schedule.alphas_cumprod(self.schedule))
        below = visited - self.schedule.train_steps // self.steps
        last = self.schedule.train_steps - 1
        return table[visited.clip(max=last)], jnp.where(below < 0, 1.0, table[below.clip(0, last)])

    def walk(
        self,
        predict_noise: Remembers,
        latents: Float[Array, "b h w c"],
        conditions: Any,
        step_noise: Float[Array, "steps b h w c"] | None,
        memory: Any,
    ) -> tuple[Float[Array, "b h w c"], Any]:
        """As in `Sampler`. Raises ValueError without `step_noise`."""
        if step_noise is None:
            raise ValueError("step_noise is None: ancestral sampling needs (steps, B, h, w, c) standard normal noise")

        def step(carry: tuple[Array, Any], now: tuple[Any, ...]) -> tuple[tuple[Array, Any], None]:
            (x, memory), (alpha, alpha_below, fresh, condition) = carry, now
            noise, memory = predict_noise(x, condition, memory)
            clean = (x - jnp.sqrt(1 - alpha) * noise) / jnp.sqrt(alpha)
            ratio = alpha / alpha_below
            mean = (
                jnp.sqrt(alpha_below) * (1 - ratio) / (1 - alpha) * clean
                + jnp.sqrt(ratio) * (1 - alpha_below) / (1 - alpha) * x
            )
            deviation = jnp.sqrt((1 - alpha_below) / (1 - alpha) * (1 - ratio))
            return (mean + deviation * fresh, memory), None

        return jax.lax.scan(step, (latents, memory), (*self.alphas(), step_noise, conditions))[0]


SAMPLERS: Mapping[str, Callable[[ScheduleConfig, int], Sampler]] = dict(zip(names.SAMPLERS, (Euler, DDPM), strict=True))
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
