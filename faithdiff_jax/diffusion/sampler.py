"""What every sampler is: an object that knows arrays and a callable that predicts noise, never models.

A sampler is a frozen dataclass of a schedule and a number of steps: hashable, so that it is static under jit. It walks
down its timesteps in one `lax.scan`, or a few steps at a time; what it remembers from step to step is in a `Carry`.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Real

from faithdiff_jax.diffusion import names, schedule
from faithdiff_jax.diffusion.schedule import ScheduleConfig

PredictNoise = Callable[[jax.Array, Any], jax.Array]
"""(x, condition) -> noise: x is (B, h, w, c) of unit variance, sqrt(a) * clean + sqrt(1 - a) * noise."""
Remembers = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]
"""(x, condition, memory) -> noise, memory: the same for a callable that takes something from step to step."""


Predict = Callable[[jax.Array], tuple[jax.Array, Any]]
"""x -> noise, memory: what a step sees of that."""


Fresh = Float[Array, "b h w c"] | None
"""Standard normal noise for one step, where a sampler needs it."""


class Carry(NamedTuple):
    """What goes from step to step.

    Attributes:
        latents: (B, h, w, c).
        past: what the sampler remembers, a pytree.
        memory: what the model remembers, a pytree.
    """

    latents: jax.Array
    past: Any
    memory: Any


@dataclasses.dataclass(frozen=True)
class Sampler(abc.ABC):
    """What every sampler offers; made by `samplers.SAMPLERS[name](schedule, steps)`.

    Attributes:
        schedule: the noise schedule.
        steps: evaluations of the model, 1 to `schedule.train_steps`.
        sigma_spacing: how noise levels are spread, one of `names.SIGMA_SPACINGS`.
        visited: timesteps of one's own, falling, as many as steps; None for the schedule's.
        needs_step_noise: whether fresh noise is added at every step.

    Raises:
        ValueError: a spacing there is not, timesteps that do not fall, or both at once.
    """

    schedule: ScheduleConfig
    steps: int
    sigma_spacing: str = "default"
    visited: tuple[int, ...] | None = None

    needs_step_noise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.sigma_spacing not in names.SIGMA_SPACINGS:
            raise ValueError(f"sigma_spacing is {self.sigma_spacing!r}: must be in {', '.join(names.SIGMA_SPACINGS)}")
        if self.visited is None:
            return
        if self.sigma_spacing != "default":
            raise ValueError(f"sigma_spacing is {self.sigma_spacing!r}: must be 'default' with timesteps of one's own")
        inside = all(0 <= timestep < self.schedule.train_steps for timestep in self.visited)
        if not inside or len(self.visited) != self.steps or np.any(np.diff(self.visited) >= 0):
            limit = self.schedule.train_steps - 1
            raise ValueError(f"visited is {self.visited}: must be {self.steps} falling timesteps from {limit} to 0")

    @property
    def init_noise_scale(self) -> float:
        """What standard normal noise is multiplied by to start from: 1 for walks on what has unit variance."""
        return 1.0

    def spaced_timesteps(self) -> Real[np.ndarray, " steps"]:
        """The timesteps that the schedule's own spacing gives."""
        return schedule.timesteps(self.schedule, self.steps)

    def spread_sigmas(self) -> Float[np.ndarray, " steps"]:
        """The noise levels that another spacing than the default gives, falling; from those of the timesteps."""
        levels = schedule.sigmas_at(self.schedule, self.spaced_timesteps())
        return schedule.spread(float(levels[0]), float(levels[-1]), self.steps, self.sigma_spacing)

    def timesteps(self) -> Real[np.ndarray, " steps"]:
        """The timesteps at which noise is predicted, falling; not whole where sigmas are spread otherwise."""
        if self.visited is not None:
            return np.asarray(self.visited, np.int32)
        if self.sigma_spacing == "default":
            return self.spaced_timesteps()
        return schedule.timesteps_of(self.schedule, self.spread_sigmas()).astype(np.float32)

    def sigmas(self) -> Float32[np.ndarray, " levels"]:
        """(steps + 1,) noise over signal at each of `timesteps`, then 0."""
        spread = self.sigma_spacing != "default"
        levels = self.spread_sigmas() if spread else schedule.sigmas_at(self.schedule, self.timesteps())
        return np.append(levels, 0).astype(np.float32)

    def alphas(self) -> Float32[np.ndarray, " steps"]:
        """The share of the clean signal's variance in what the model sees at each step."""
        if self.sigma_spacing == "default":
            return schedule.alphas_at(self.schedule, self.timesteps())
        return np.asarray(1 / (self.sigmas()[:-1] ** 2 + 1))

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

        return self.walk(predict, self.begin(latents), conditions, step_noise).latents

    def begin(self, latents: Float[Array, "b h w c"], memory: Any = None) -> Carry:
        """What the first step starts from; `memory` is the model's, a pytree of fixed shapes."""
        return Carry(latents, self.empty_past(latents), memory)

    def walk(
        self,
        predict_noise: Remembers,
        carry: Carry,
        conditions: Any,
        step_noise: Float[Array, "steps b h w c"] | None = None,
        part: tuple[Any, Any] | None = None,
    ) -> Carry:
        """`sample` from one carry to another: all steps, or a part of them.

        `part` is the first of its steps and the one after its last; both may be traced. Raises ValueError without
        `step_noise` where it is needed.
        """
        every = self._every(conditions, step_noise)
        step = functools.partial(self._step_with, predict_noise)
        if part is None:
            return jax.lax.scan(lambda carry, now: (step(carry, now), None), carry, every)[0]
        every = jax.tree.map(jnp.asarray, every)
        run = lambda i, carry: step(carry, jax.tree.map(lambda x: x[i], every))  # noqa: E731
        end: Carry = jax.lax.fori_loop(*part, run, carry)
        return end

    def walked(
        self,
        predict_noise: Remembers,
        carry: Carry,
        conditions: Any,
        step_noise: Float[Array | np.ndarray, "steps b h w c"] | None = None,
    ) -> Iterator[Carry]:
        """`walk` outside of jit, for models that are no one program: the carry after each step."""
        every = self._every(conditions, step_noise)
        for number in range(self.steps):
            now = jax.tree.map(lambda x: jnp.asarray(x[number]), every)  # noqa: B023  called at once
            carry = self._step_with(predict_noise, carry, now)
            yield carry

    def _every(self, conditions: Any, step_noise: Float[Array | np.ndarray, "steps b h w c"] | None) -> tuple[Any, ...]:
        """What each step is given, with a leading axis of steps."""
        if self.needs_step_noise and step_noise is None:
            raise ValueError("step_noise is None: ancestral sampling needs (steps, B, h, w, c) standard normal noise")
        return self.coefficients(), step_noise if self.needs_step_noise else None, conditions

    def _step_with(self, predict_noise: Remembers, carry: Carry, now: tuple[Any, ...]) -> Carry:
        coefficients, fresh, condition = now
        return self.step(lambda x: predict_noise(x, condition, carry.memory), carry, coefficients, fresh)

    def empty_past(self, latents: Float[Array, "b h w c"]) -> Any:
        """What the sampler remembers before the first step: nothing."""
        return None

    @abc.abstractmethod
    def coefficients(self) -> Any:
        """What the formula of a step needs to know of the schedule: a pytree with a leading axis of steps."""

    @abc.abstractmethod
    def step(
        self,
        predict: Predict,
        carry: Carry,
        coefficients: Any,
        fresh: Fresh,
    ) -> Carry:
        """One step.

        Args:
            predict: latents of unit variance -> noise, and the model's new memory.
            carry: from the step before.
            coefficients: this step's.
            fresh: this step's noise, where `needs_step_noise`.
        """
