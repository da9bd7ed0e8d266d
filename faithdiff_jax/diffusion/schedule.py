"""The noise schedule: cumulative alphas, a sampler's sigmas and timesteps, the forward process, what is predicted."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int32, Integer, Real

Latents = Float[Array, "b h w c"] | Float[np.ndarray, "b h w c"]
Timesteps = Real[Array, "*b"] | Real[np.ndarray, "*b"] | int
"""One for all samples of a batch, or one for each; whole numbers, in any type where they are not looked up."""

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing")
MOST_TRAIN_STEPS = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Scaled-linear betas over `train_steps`; the defaults are SDXL's."""

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps_offset: int = 1
    prediction: str = "epsilon"
    """What the UNet puts out, in the words of diffusers: noise ("epsilon", SDXL), "v_prediction" (Salimans and Ho 2022,
    SD 2.1), or the clean latent itself ("sample")."""
    spacing: str = "leading"
    """How a sampler spreads its steps, in the words of diffusers: "leading" (published) counts up from `steps_offset`,
    "trailing" down from the last timestep, so that few steps start where there is nothing but noise."""

    def __post_init__(self) -> None:
        for name in ("train_steps", "steps_offset"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} is {getattr(self, name)!r}: must be a whole number")
        if self.train_steps < 1:
            raise ValueError(f"train_steps is {self.train_steps}: must be at least 1")
        if self.train_steps > MOST_TRAIN_STEPS:
            raise ValueError(f"train_steps is {self.train_steps}: must be at most {MOST_TRAIN_STEPS:,}")
        if not 0 <= self.steps_offset <= self.train_steps:
            raise ValueError(f"steps_offset is {self.steps_offset}: must be from 0 to train_steps, {self.train_steps}")
        if not (0 < self.beta_start < 1 and 0 < self.beta_end < 1):
            raise ValueError(f"beta_start is {self.beta_start} and beta_end {self.beta_end}: must lie between 0 and 1")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction is {self.prediction!r}: must be one of {', '.join(PREDICTIONS)}")
        if self.spacing not in SPACINGS:
            raise ValueError(f"spacing is {self.spacing!r}: must be one of {', '.join(SPACINGS)}")


def alphas_cumprod(config: ScheduleConfig) -> Float32[np.ndarray, "train_steps"]:
    """(train_steps,): the share of the clean signal's variance left at each timestep."""
    betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.train_steps, dtype=np.float32) ** 2
    return np.cumprod(1.0 - betas, dtype=np.float32)


def timesteps(config: ScheduleConfig, steps: int) -> Int32[np.ndarray, "{steps}"]:
    """(steps,) int32, falling: for 20 steps of 1000, 951, 901, ... 1 ("leading") or 999, 949, ... 49 ("trailing").

    With as many steps as training has, the offset leads one past the last timestep; the published sampler lets it,
    and takes the last timestep's noise level there. Source: section 3.3 of Lin et al. 2024 (trailing).

    Raises:
        ValueError: steps below 1 or above `train_steps`.
    """
    if not 1 <= steps <= config.train_steps:
        raise ValueError(f"steps is {steps}: must be between 1 and {config.train_steps}")
    if config.spacing == "trailing":
        return (np.rint(np.arange(steps, 0, -1) * config.train_steps / steps) - 1).astype(np.int32)
    spacing = config.train_steps // steps
    return (np.arange(steps - 1, -1, -1) * spacing + config.steps_offset).astype(np.int32)


def sigmas(config: ScheduleConfig, steps: int) -> Float32[np.ndarray, "{steps}+1"]:
    """(steps + 1,) float32: noise over signal, sqrt((1 - a) / a), at each of `timesteps`, then 0.

    Source: Karras et al. 2022 (EDM) in the form of k-diffusion, which the published sampler uses.
    """
    return np.append(sigmas_at(config, timesteps(config, steps)), 0).astype(np.float32)


def sigmas_at(config: ScheduleConfig, visited: Integer[np.ndarray, "steps"]) -> Float32[np.ndarray, "steps"]:
    """(steps,) noise over signal at whole timesteps; past the last one, as at the last."""
    alphas = alphas_at(config, visited)
    return np.asarray(((1 - alphas) / alphas) ** 0.5)


def alphas_at(config: ScheduleConfig, visited: Integer[np.ndarray, "steps"]) -> Float32[np.ndarray, "steps"]:
    """(steps,) `alphas_cumprod` at whole timesteps; past the last one, as at the last."""
    return np.asarray(alphas_cumprod(config)[np.minimum(visited, config.train_steps - 1)])


def spread(highest: float, lowest: float, steps: int, spacing: str) -> Float64[np.ndarray, "{steps}"]:
    """(steps,) sigmas from the highest to the lowest, both above 0.

    "karras": even steps of sigma^(1/7) (Karras et al. 2022, equation 5); "exponential": even steps of log sigma.
    """
    ramp = np.linspace(0, 1, steps)
    if spacing == "karras":
        return np.asarray((highest ** (1 / 7) + ramp * (lowest ** (1 / 7) - highest ** (1 / 7))) ** 7)
    return np.asarray(np.exp(np.log(highest) + ramp * (np.log(lowest) - np.log(highest))))


def timesteps_of(config: ScheduleConfig, levels: Float64[np.ndarray, "steps"]) -> Float64[np.ndarray, "steps"]:
    """The timesteps, not whole, at which the noise levels are these sigmas: linear in log sigma between two."""
    alphas = alphas_cumprod(config).astype(np.float64)
    table = np.log((1 - alphas) / alphas) / 2
    return np.asarray(np.interp(np.log(levels), table, np.arange(len(table))))


def add_noise(config: ScheduleConfig, latents: Latents, noise: Latents, timestep: Timesteps) -> Float[Array, "b h w c"]:
    """The forward process q(x_t | x_0): sqrt(a_t) * latents + sqrt(1 - a_t) * noise (paper, equation 2).

    Args:
        config: the schedule.
        latents: (B, h, w, c), scaled.
        noise: (B, h, w, c).
        timestep: one timestep, or (B,), in 0..train_steps - 1.

    Returns:
        (B, h, w, c).
    """
    signal, deviation = _rates(jnp.asarray(alphas_cumprod(config))[timestep])
    return signal * latents + deviation * noise


def target(config: ScheduleConfig, latents: Latents, noise: Latents, timestep: Timesteps) -> Float[Array, "b h w c"]:
    """What the UNet should predict for the `add_noise` of the same arguments, (B, h, w, c).

    The noise, or v = sqrt(a_t) * noise - sqrt(1 - a_t) * latents (Salimans and Ho 2022, appendix D), or the latents.
    """
    if config.prediction == "epsilon":
        return jnp.asarray(noise)
    if config.prediction == "sample":
        return jnp.asarray(latents)
    signal, deviation = _rates(jnp.asarray(alphas_cumprod(config))[timestep])
    return signal * noise - deviation * latents


def to_noise(config: ScheduleConfig, output: Latents, noisy: Latents, timestep: Timesteps) -> Float[Array, "b h w c"]:
    """The noise that the UNet's output for `noisy` stands for, all (B, h, w, c); `noisy` has unit variance."""
    if config.prediction == "epsilon":  # of timesteps that are no whole numbers too
        return jnp.asarray(output)
    return noise_at(config.prediction, output, noisy, jnp.asarray(alphas_cumprod(config))[timestep])


def noise_at(prediction: str, output: Latents, noisy: Latents, alpha: Float[Array, "*b"]) -> Float[Array, "b h w c"]:
    """`to_noise` where `noisy` is sqrt(alpha) * clean + sqrt(1 - alpha) * noise; alpha is one for all or (B,)."""
    output, noisy = jnp.asarray(output), jnp.asarray(noisy)
    if prediction == "epsilon":
        return output
    signal, deviation = _rates(alpha)
    if prediction == "sample":
        return (noisy - signal * output) / deviation
    return signal * output + deviation * noisy


def to_clean(config: ScheduleConfig, output: Latents, noisy: Latents, timestep: Timesteps) -> Float[Array, "b h w c"]:
    """The clean latents that the UNet's output for `noisy` stands for, all (B, h, w, c); `noisy` has unit variance."""
    output, noisy = jnp.asarray(output), jnp.asarray(noisy)
    if config.prediction == "sample":
        return output
    signal, deviation = _rates(jnp.asarray(alphas_cumprod(config))[timestep])
    if config.prediction == "epsilon":
        return (noisy - deviation * output) / signal
    return signal * noisy - deviation * output


def _rates(alpha: Float[Array, "*b"]) -> tuple[Float32[Array, "_ 1 1 1"], Float32[Array, "_ 1 1 1"]]:
    """sqrt(a) and sqrt(1 - a), broadcasting over (B, h, w, c)."""
    alpha = jnp.reshape(alpha, (-1, 1, 1, 1))
    return jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
