"""Samplers that use the predictions of earlier steps: as exact as Euler in fewer of its own.

Both solve the diffusion ODE in lambda = log(signal / noise), in terms of the clean latent that a prediction stands for,
and take the last steps at lower order, as diffusers does. What a step multiplies by is computed beforehand, in float64.
"""

import abc
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int32, Real

from faithdiff_jax.diffusion import schedule
from faithdiff_jax.diffusion.sampler import Carry, Fresh, Predict, Sampler


class _Levels:
    """Of every step, and of 0 at the end: the schedule in the terms of these solvers, in float64."""

    def __init__(self, sigmas: Float32[np.ndarray, " levels"]):
        levels = sigmas.astype(np.float64)
        self.signal = 1 / np.sqrt(levels**2 + 1)
        self.noise = levels * self.signal
        with np.errstate(divide="ignore"):  # infinite at the end
            self.lambdas = -np.log(levels)
        self.strides = np.diff(self.lambdas)  # the last is infinite
        self.falls = -np.expm1(-self.strides)  # 1 - exp(-h)
        # The first and the last step are of first order; and those that a stride of 0 leaves no other, where an offset
        # leads several timesteps past the schedule's last.
        moving = self.strides > 0
        self.second_order = np.zeros(len(self.strides), bool)
        self.second_order[1:-1] = moving[1:-1] & moving[:-2]
        self.ratios = np.ones(len(self.strides))  # of the stride before to this one
        np.divide(self.strides[:-1], self.strides[1:], out=self.ratios[1:], where=self.second_order[1:])


@dataclasses.dataclass(frozen=True)
class Multistep(Sampler):
    """What the two share: timesteps and noise levels as diffusers spreads them for such solvers."""

    def spaced_timesteps(self) -> Int32[np.ndarray, " steps"]:
        """As in `schedule.timesteps`, but "leading" leaves room for one more step at the end: 941 for 20 of 1000."""
        if self.schedule.spacing != "leading":
            return schedule.timesteps(self.schedule, self.steps)
        if not 1 <= self.steps < self.schedule.train_steps:
            raise ValueError(f"steps is {self.steps}: must be between 1 and {self.schedule.train_steps - 1}")
        stride = self.schedule.train_steps // (self.steps + 1)
        return (np.arange(self.steps, 0, -1) * stride + self.schedule.steps_offset).astype(np.int32)

    def spread_sigmas(self) -> Float64[np.ndarray, " steps"]:
        """Over all of the schedule, not from the first timestep to the last."""
        highest, lowest = schedule.sigmas_at(self.schedule, np.array([self.schedule.train_steps - 1, 0]))
        return schedule.spread(float(highest), float(lowest), self.steps, self.sigma_spacing)

    def timesteps(self) -> Real[np.ndarray, " steps"]:
        """Whole ones: rounded where sigmas are spread after Karras, cut off where exponentially, as in diffusers."""
        visited = super().timesteps()
        return (np.rint(visited) if self.sigma_spacing == "karras" else visited).astype(np.int32)

    def clean(self, predict: Predict, x: Float[Array, "b h w c"], alpha: Array) -> tuple[Float[Array, "b h w c"], Any]:
        """The clean latent that the model's prediction stands for, and the model's memory."""
        noise, memory = predict(x)
        return (x - jnp.sqrt(1 - alpha) * noise) / jnp.sqrt(alpha), memory

    @abc.abstractmethod
    def factors(self, levels: _Levels) -> dict[str, Float64[np.ndarray, " steps"]]:
        """What a step multiplies by what."""

    def coefficients(self) -> tuple[Any, dict[str, Float[Array, " steps"]]]:
        """The share of the signal at each step, and its `factors`."""
        factors = self.factors(_Levels(self.sigmas()))
        return self.alphas(), {name: jnp.asarray(values, jnp.float32) for name, values in factors.items()}


@dataclasses.dataclass(frozen=True)
class DPMSolver2M(Multistep):
    """DPM-Solver++(2M), the deterministic one (Lu et al. 2022, "DPM-Solver++", algorithm 2)."""

    def empty_past(self, latents: Float[Array, "b h w c"]) -> Any:
        """The clean latent of the step before."""
        return jnp.zeros_like(latents)

    def factors(self, levels: _Levels) -> dict[str, Float64[np.ndarray, " steps"]]:
        """Of x, of the clean latent, and of how it has changed."""
        clean = levels.signal[1:] * levels.falls
        change = np.where(levels.second_order, clean / levels.ratios / 2, 0)
        return {"x": levels.noise[1:] / levels.noise[:-1], "clean": clean, "change": change}

    def step(self, predict: Predict, carry: Carry, coefficients: Any, fresh: Fresh) -> Carry:
        """As in `Sampler`."""
        alpha, factors = coefficients
        clean, memory = self.clean(predict, carry.latents, alpha)
        x = factors["x"] * carry.latents + factors["clean"] * clean + factors["change"] * (clean - carry.past)
        return Carry(x, clean, memory)


@dataclasses.dataclass(frozen=True)
class UniPC(DPMSolver2M):
    """UniPC of order 2 with B(h) = exp(h) - 1: each prediction also corrects the step to it (Zhao et al. 2023)."""

    def empty_past(self, latents: Float[Array, "b h w c"]) -> Any:
        """The corrected latents that the step before started from, and the clean latents of the two before."""
        zeros = jnp.zeros_like(latents)
        return zeros, zeros, zeros

    def factors(self, levels: _Levels) -> dict[str, Float64[np.ndarray, " steps"]]:
        """Of the predictor those of `DPMSolver2M`; of the corrector of the step before, nothing at the first step."""
        predictor = super().factors(levels)
        # The corrector of a step is applied when the next prediction is there: there is none for the last.
        second, r, strides = levels.second_order[:-1], levels.ratios[:-1], levels.strides[:-1]
        from_x, from_clean = predictor["x"][:-1], predictor["clean"][:-1]
        h = np.where(strides > 0, strides, 1)
        phi_1 = np.expm1(-h)
        phi_2 = phi_1 / -h - 1
        phi_3 = phi_2 / -h - 1 / 2
        b_1, b_2 = phi_2 / phi_1, 2 * phi_3 / phi_1
        # rho: [[1, 1], [-r, 1]] (of the older change, of the newest) = [b_1, b_2]; 1/2 alone at first order.
        older = np.where(second, (b_1 - b_2) / (1 + r), 0)
        newest = np.where(second, b_1 - older, 0.5)
        corrector = {
            "corrected_x": from_x,
            "corrected_clean": from_clean,
            "corrected_older": from_clean * older / -r,
            "corrected_newest": from_clean * newest,
        }
        shifted = {name: np.append(0.0, values) for name, values in corrector.items()}
        return predictor | shifted | {"first": np.append(1.0, np.zeros(self.steps - 1))}

    def step(self, predict: Predict, carry: Carry, coefficients: Any, fresh: Fresh) -> Carry:
        """As in `Sampler`."""
        alpha, factors = coefficients
        before, last, older = carry.past
        clean, memory = self.clean(predict, carry.latents, alpha)
        x = (
            factors["first"] * carry.latents
            + factors["corrected_x"] * before
            + factors["corrected_clean"] * last
            + factors["corrected_older"] * (older - last)
            + factors["corrected_newest"] * (clean - last)
        )
        following = factors["x"] * x + factors["clean"] * clean + factors["change"] * (clean - last)
        return Carry(following, (x, clean, last), memory)
