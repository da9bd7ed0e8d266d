"""The denoising program of FaithDiff: what is constant is computed once, then every step runs over the tiles.

    LQ features --cut by the grid--> condition of each tile  \
    contexts --> text keys and values                         > every step: tiles -> UNet -> guidance -> blend
    timesteps, pooled text, time ids --> embeddings          /

`SamplingPlan` says what is static, `SamplingInputs` holds the arrays (see `inputs`); `denoise` is `begin` and `advance`
in one program, and the two are also programs of their own, to look in from outside between steps.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from faithdiff_jax.diffusion import schedule
from faithdiff_jax.diffusion.sampler import Carry
from faithdiff_jax.inference.inputs import SamplingInputs, SamplingPlan
from faithdiff_jax.inference.predictor import Predictor
from faithdiff_jax.inference.prepared import Constrain, Prepared, prepare
from faithdiff_jax.models.attribution import Maps, Words
from faithdiff_jax.models.faithdiff import Denoiser


def denoise(
    denoiser: Denoiser, plan: SamplingPlan, inputs: SamplingInputs, constrain: Constrain = lambda x: x
) -> Float[Array, "b h w c"]:
    """Denoise from the start point to a clean, scaled latent, in float32.

    Args:
        denoiser: UNet and aligner.
        plan: what is static.
        inputs: the arrays.
        constrain: applied to every batch that goes through the UNet, to lay it out over devices.
    """
    return denoise_and_attribute(denoiser, plan, inputs, None, constrain)[0]


def denoise_and_attribute(
    denoiser: Denoiser,
    plan: SamplingPlan,
    inputs: SamplingInputs,
    words: Words | None,
    constrain: Constrain = lambda x: x,
) -> tuple[Float[Array, "b h w c"], Maps | None]:
    """`denoise`, and which pixels looked at which words of the caption (see `models.attribution`).

    Args:
        denoiser: as for `denoise`, like `plan`, `inputs` and `constrain`.
        plan: what is static.
        inputs: the arrays.
        words: (B, M, W), the weight of each token of the caption in each word; None for no maps.
        constrain: see `denoise`.

    Returns:
        The latent (B, H, W, c), as without maps but for rounding; and (B, H, W, W'), for each word what part of a
        pixel's attention went to it, 0 to 1 but for what interpolation adds: the mean over heads, layers and steps.
        Tiles are blended as those of the latents are, at every step.
    """
    prepared, carry = begin(denoiser, plan, inputs, words, constrain)
    carry = advance(denoiser, plan, inputs, prepared, carry, words=words, constrain=constrain)
    maps = carry.memory.maps
    return carry.latents, None if maps is None else maps / plan.sampler.steps


def begin(
    denoiser: Denoiser,
    plan: SamplingPlan,
    inputs: SamplingInputs,
    words: Words | None = None,
    constrain: Constrain = lambda x: x,
    *,
    keep_clean: bool = False,
) -> tuple[Prepared, Carry]:
    """Everything before the first step: what all steps share, and the start point. Arguments as of `advance`.

    `keep_clean` asks for `Memory.clean`.
    """
    sampler = plan.sampler
    prepared = prepare(denoiser, plan, inputs, constrain)
    latents = inputs.noise * sampler.init_noise_scale
    if inputs.start is not None:  # the LQ latent, noised to the last timestep (published `start_point="lr"`)
        latents = schedule.add_noise(sampler.schedule, inputs.start, latents, sampler.schedule.train_steps - 1)
    memory = Predictor(denoiser, plan, prepared, inputs, None, constrain).empty_memory(keep_clean=keep_clean)
    if words is not None:
        memory = memory._replace(maps=jnp.zeros((*latents.shape[:3], words.shape[-1]), jnp.float32))
    return prepared, sampler.begin(latents, memory)


def advance(
    denoiser: Denoiser,
    plan: SamplingPlan,
    inputs: SamplingInputs,
    prepared: Prepared,
    carry: Carry,
    *,
    part: tuple[Any, Any] | None = None,
    words: Words | None = None,
    constrain: Constrain = lambda x: x,
) -> Carry:
    """Walk all steps, or the part of them from one to before another, which may be traced.

    Args:
        denoiser: as for `denoise`, like `plan`, `inputs` and `constrain`.
        plan: what is static.
        inputs: the arrays.
        prepared: from `begin`.
        carry: from `begin`, or from the part before.
        part: the first step and the one after the last; None for all.
        words: see `denoise_and_attribute`.
        constrain: see `denoise`.
    """
    if words is not None:
        words = jnp.tile(words, (plan.tile_batch, 1, 1))
    predict = Predictor(denoiser, plan, prepared, inputs, words, constrain)
    return plan.sampler.walk(predict, carry, predict.conditions(), inputs.step_noise, part)
