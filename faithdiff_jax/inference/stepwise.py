"""The denoising loop seen from outside, one step at a time: progress, previews, and a way to stop."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from faithdiff_jax.errors import Cancelled
from faithdiff_jax.inference.inputs import SamplingInputs, SamplingPlan
from faithdiff_jax.inference.programs import Programs
from faithdiff_jax.models.parts import Params

Preview = Callable[..., UInt8[np.ndarray, "H W 3"]]
OnStep = Callable[[int, int, Preview], object]
"""(steps done, steps there are, preview) -> False to stop, anything else to go on.

`preview()` decodes what the last prediction says the finished picture is; it costs what decoding costs, when called.
Of a batch, `preview(number)` is that of one of its pictures, the first is 0.
"""


def sample_stepwise(
    programs: Programs,
    params: Params,
    plan: SamplingPlan,
    inputs: SamplingInputs,
    on_step: OnStep,
    picture: Callable[..., UInt8[np.ndarray, "H W 3"]],
) -> Float[Array, "b h w c"]:
    """What `programs.sample` computes, with `on_step` called after every step.

    Args:
        programs: of the model.
        params: of UNet and aligner.
        plan: what is static.
        inputs: the arrays.
        on_step: see `OnStep`; what it raises ends the loop.
        picture: (latents, number) -> that picture of the batch, the first without a number.

    Raises:
        Cancelled: `on_step` returned False.
    """
    steps = plan.sampler.steps
    prepared, carry = programs.begin(params, plan, inputs)
    for step in range(steps):
        carry = programs.advance(params, plan, inputs, prepared, carry, np.int32(step), np.int32(step + 1))
        clean = jax.block_until_ready(carry).memory.clean
        if on_step(step + 1, steps, functools.partial(picture, clean)) is False:
            raise Cancelled(f"stopped after step {step + 1} of {steps}, as asked")
    return carry.latents
