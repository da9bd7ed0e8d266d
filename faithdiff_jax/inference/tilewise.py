"""The denoising loop from the host, tile by tile: for latents whose LQ features no device and no memory holds.

    features on disk --tiles--> condition \\
    latents --tiles----------------------> UNet -> guidance -> blend on the host -> the sampler's step

The device holds a chunk of tiles and, while the sampler steps, the latents.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from faithdiff_jax.diffusion import schedule
from faithdiff_jax.errors import Cancelled
from faithdiff_jax.files.spill import Spill
from faithdiff_jax.inference.inputs import SamplingInputs, SamplingPlan
from faithdiff_jax.inference.prepared import Prepared
from faithdiff_jax.inference.stepwise import OnStep
from faithdiff_jax.inference.tiling import gaussian_weights

if TYPE_CHECKING:
    from faithdiff_jax.inference.pipeline import FaithDiff


@dataclasses.dataclass(frozen=True)
class Look:
    """Called after a step with the steps done, the steps there are and the clean latent; False to stop.

    Attributes:
        on_step: see `stepwise.OnStep`.
        picture: makes a picture of a latent.
    """

    on_step: OnStep
    picture: Callable[[Float[Array, "1 h w c"]], UInt8[np.ndarray, "H W 3"]]

    def __call__(self, step: int, steps: int, clean: Float[Array, "1 h w c"]) -> object:
        """As above."""
        return self.on_step(step, steps, lambda number=0: self.picture(clean))


def denoise_by_tiles(
    model: "FaithDiff", plan: SamplingPlan, inputs: SamplingInputs, features: Spill, look: Look | None = None
) -> Float[Array, "1 h w c"]:
    """What `denoise` gives, but for rounding; of one picture.

    Args:
        model: what denoises.
        plan: what is static; its steps take nothing over from one another.
        inputs: the arrays, without features.
        features: LQ features (h, w, F).
        look: at what every step gave.

    Raises:
        Cancelled: `look` says so.
    """
    steps = plan.sampler.steps
    prepared, carry = model.programs.begin(model.denoiser_params, plan, inputs)
    carry = carry._replace(memory=None)
    predict = TiledNoise(model, plan, inputs, prepared, features, keep_clean=look is not None)
    conditions = prepared.steps[0], np.arange(steps)
    step_noise = inputs.step_noise
    del inputs
    for step, carry in enumerate(plan.sampler.walked(predict, carry, conditions, step_noise), 1):  # noqa: B020
        jax.block_until_ready(carry)
        if look is not None and look(step, steps, carry.memory) is False:
            raise Cancelled(f"stopped after step {step} of {steps}, as asked")
    return carry.latents


class TiledNoise:
    """Predicts the noise of latents on the host, chunk by chunk of their tiles; what `Predictor` does on the device."""

    def __init__(
        self,
        model: "FaithDiff",
        plan: SamplingPlan,
        inputs: SamplingInputs,
        prepared: Prepared,
        features: Spill,
        *,
        keep_clean: bool,
    ):
        """`prepared` is without conditions, which are made of `features` for each tile anew."""
        self._params, self._program = model.denoiser_params, model.programs.predict_cut
        self._plan, self._prepared, self._features = plan, prepared, features
        self._keep_clean = keep_clean
        height, width = plan.tile
        # Of the arrays of the picture's size, programs for tiles need none; of the noise, they look at the batch.
        self._inputs = dataclasses.replace(
            inputs, noise=np.asarray(inputs.noise)[:, :height, :width], start=None, step_noise=None
        )
        self._weights = gaussian_weights(height, width)[None, :, :, None]
        self._total_weight = np.zeros((1, *np.shape(inputs.noise)[1:3], 1), np.float32)
        for top, left in plan.corners:
            self._total_weight[:, top : top + height, left : left + width] += self._weights

    def __call__(
        self, x: Float[Array, "1 h w c"], condition: tuple[Any, Any], memory: Any
    ) -> tuple[Float[Array, "1 h w c"], Any]:
        """(1, h, w, c) of unit variance, (alpha, number of the step) -> noise; and the clean latent, if it is kept."""
        alpha, step = condition
        total = np.zeros(x.shape, np.float32)
        before = None
        for chunk in self._chunks(np.asarray(x), int(step)):  # each is computed while the next is read
            if before is not None:
                self._add(total, *before)
            before = chunk
        assert before is not None
        self._add(total, *before)
        total /= self._total_weight
        noise = schedule.noise_at(self._plan.sampler.schedule.prediction, jnp.asarray(total), x, alpha)
        clean = (x - jnp.sqrt(1 - alpha) * noise) / jnp.sqrt(alpha) if self._keep_clean else None
        return noise, clean

    def _chunks(self, x: np.ndarray, step: int) -> Iterator[tuple[Any, Any]]:
        """Corners, and what the UNet puts out for the tiles there."""
        plan, (height, width) = self._plan, self._plan.tile
        for chunk in range(math.ceil(len(plan.corners) / plan.tile_batch)):
            corners = plan.corners[chunk * plan.tile_batch : (chunk + 1) * plan.tile_batch]
            filled = corners + corners[-1:] * (plan.tile_batch - len(corners))
            latents = np.concatenate([x[:, top : top + height, left : left + width] for top, left in filled])
            features = np.stack([self._features.read(*corner, height, width) for corner in filled])
            given = latents, features, np.int32(chunk), np.int32(step)
            kind = plan.evaluations[step]
            yield corners, self._program(self._params, plan, kind, self._inputs, self._prepared, *given)

    def _add(self, total: np.ndarray, corners: Any, tiles: Any) -> None:
        height, width = self._plan.tile
        for (top, left), tile in zip(corners, np.asarray(tiles), strict=False):
            total[:, top : top + height, left : left + width] += tile * self._weights
