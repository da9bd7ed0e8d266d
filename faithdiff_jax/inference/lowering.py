"""The denoising program of a picture for a device that is not there: shapes only, no memory."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from faithdiff_jax.inference.inputs import SamplingInputs, SamplingPlan, Text, plan_sampling
from faithdiff_jax.inference.loading import DENOISING, shaped_parameters
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.inference.programs import Programs
from faithdiff_jax.models.backend import trace_for
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.planning import flops
from faithdiff_jax.sharding import bytes_on_device


@dataclasses.dataclass(frozen=True)
class PlannedRestoration:
    """The denoising of a picture before there are a device, a picture or a model directory.

    Attributes:
        model: the architecture.
        options: as in `restore`: steps, guidance, tile, overlap and batch count.
        size: (H, W) of the padded picture, in pixels.
        dtype: of parameters and of computing.
        quantized: the 8-bit format of kernels, None for `dtype`.
    """

    model: FaithDiffConfig
    options: RestoreOptions
    size: tuple[int, int]
    dtype: Any = jnp.bfloat16
    quantized: str | None = None

    @property
    def plan(self) -> SamplingPlan:
        """Sampler and tiles."""
        height, width = (side // self.model.vae.factor for side in self.size)
        return plan_sampling(self.options, self.model.schedule, height, width)

    def flops(self) -> float:
        """FLOPs of all steps on all tiles."""
        sample = Programs(self.model, dtype=self.dtype).sample.function
        return flops.count(functools.partial(_swapped, sample, self.plan), *self._arguments(jax.ShapeDtypeStruct))

    def lower(self, device: jax.Device) -> tuple[jax.stages.Lowered, dict[str, int]]:
        """Traced and lowered for a TPU's device, and bytes of its arguments, by what they are."""
        on_device = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
        params, inputs = self._arguments(on_device)
        held = {name: bytes_on_device(tree) for name, tree in (("parameters", params), ("inputs", inputs))}
        with trace_for("tpu"):
            return Programs(self.model, dtype=self.dtype).sample.lower(params, self.plan, inputs), held

    def _arguments(self, shaped: Any) -> tuple[Any, SamplingInputs]:
        """Parameters and arrays, each made by `shaped(shape, dtype)`."""
        model, plan = self.model, self.plan
        height, width = (side // model.vae.factor for side in self.size)
        params = {part: shaped_parameters(model, part, self.dtype, shaped, self.quantized) for part in DENOISING}
        latents = shaped((1, height, width, model.vae.latent_channels), jnp.float32)
        pooled = model.unet.pooled_dim
        text = Text(
            context=shaped((1, model.text_encoders[0].positions, model.unet.context_dim), jnp.float32),
            pooled=None if pooled is None else shaped((1, pooled), jnp.float32),
        )
        inputs = SamplingInputs(
            features=shaped((1, height, width, model.feature_channels), jnp.float32),
            text=text,
            negative=text if self.options.guidance != 1 else None,
            noise=latents,
            start=latents if self.options.start == "lr" else None,
            step_noise=(
                shaped((plan.sampler.steps, *latents.shape), jnp.float32) if plan.sampler.needs_step_noise else None
            ),
            time_ids=None if pooled is None else shaped((len(plan.corners), 1, 6), jnp.float32),
            guidance=shaped((), jnp.float32) if self.options.guidance != 1 else None,
        )
        return params, inputs


def _swapped(sample: Any, plan: SamplingPlan, params: Any, inputs: SamplingInputs) -> Any:
    return sample(params, plan, inputs)
