"""The denoising program of a picture for a device that is not there: shapes only, no memory."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from faithdiff_jax.inference.evaluations import Evaluation
from faithdiff_jax.inference.inputs import SamplingInputs, SamplingPlan, Text, plan_sampling
from faithdiff_jax.inference.loading import DENOISING, shaped_parameters
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.inference.programs import Programs
from faithdiff_jax.models.backend import trace_for
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.planning import flops
from faithdiff_jax.sharding import bytes_on_device

LATENTS_OF_A_STEP = 5
"""Arrays of the latents' size that a step of Euler's has: before it, scaled, the noise, their product, after it."""


@dataclasses.dataclass(frozen=True)
class PlannedRestoration:
    """The denoising of a picture before there are a device, a picture or a model directory.

    Attributes:
        model: the architecture.
        options: as in `restore`: steps, guidance, tile, overlap and batch count.
        size: (H, W) of the padded picture, in pixels.
        dtype: of parameters and of computing.
        quantized: the 8-bit format of kernels, None for `dtype`.
        tile_captions: whether each tile has a caption of its own.
    """

    model: FaithDiffConfig
    options: RestoreOptions
    size: tuple[int, int]
    dtype: Any = jnp.bfloat16
    quantized: str | None = None
    tile_captions: bool = False

    @property
    def plan(self) -> SamplingPlan:
        """Sampler and tiles."""
        height, width = (side // self.model.vae.factor for side in self.size)
        return plan_sampling(self.options, self.model.schedule, height, width)

    @property
    def runs(self) -> int:
        """How often the program runs: once, or for every chunk of tiles of every step if the picture streams."""
        plan = self.plan
        return plan.sampler.steps * math.ceil(len(plan.corners) / plan.tile_batch) if self.streams else 1

    @property
    def streams(self) -> bool:
        """Whether the picture is worked on by parts."""
        return self.options.streams(self.size)

    def flops(self) -> float:
        """FLOPs of a run of the program; of one with guidance, if the picture streams and has any."""
        programs, shaped = Programs(self.model, dtype=self.dtype), jax.ShapeDtypeStruct
        if self.streams:
            params, *arrays = self._cut_arguments(shaped)
            program = functools.partial(_swapped, programs.predict_cut.function, (self.plan, self._kind))
            return flops.count(program, params, *arrays)
        return flops.count(
            functools.partial(_swapped, programs.sample.function, (self.plan,)), *self._arguments(shaped)
        )

    def lower(self, device: jax.Device) -> tuple[jax.stages.Lowered, dict[str, int]]:
        """Traced and lowered for a TPU's device, and bytes of what it holds, by what that is.

        For a picture that streams, "latents" are beside the program's arguments: what Euler's step has of them at once.
        """
        on_device = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
        programs = Programs(self.model, dtype=self.dtype)
        if self.streams:
            params, *arrays = self._cut_arguments(on_device)
            height, width = (side // self.model.vae.factor for side in self.size)
            latents = LATENTS_OF_A_STEP * height * width * self.model.vae.latent_channels * 4
            held = {"parameters": bytes_on_device(params), "inputs": bytes_on_device(arrays), "latents": latents}
            with trace_for("tpu"):
                return programs.predict_cut.lower(params, self.plan, self._kind, *arrays), held
        params, inputs = self._arguments(on_device)
        held = {name: bytes_on_device(tree) for name, tree in (("parameters", params), ("inputs", inputs))}
        with trace_for("tpu"):
            return programs.sample.lower(params, self.plan, inputs), held

    @property
    def _kind(self) -> Evaluation:
        """Of the evaluation that takes most."""
        return max(self.plan.evaluations, key=lambda kind: kind.guided)

    def _cut_arguments(self, shaped: Any) -> tuple[Any, ...]:
        """What `Programs.predict_cut` takes, but for what is static."""
        plan, programs = self.plan, Programs(self.model, dtype=self.dtype)
        params, inputs = self._arguments(shaped)
        inputs = dataclasses.replace(inputs, features=None, step_noise=None)
        begin = functools.partial(_swapped, programs.begin.function, (plan,))
        prepared = jax.tree.map(lambda x: shaped(x.shape, x.dtype), jax.eval_shape(begin, params, inputs)[0])
        tile, chunk = (1, *plan.tile), (plan.tile_batch, *plan.tile)
        channels = self.model.vae.latent_channels
        inputs = dataclasses.replace(inputs, noise=shaped((*tile, channels), jnp.float32), start=None)
        latents, features = (shaped((*chunk, n), jnp.float32) for n in (channels, self.model.feature_channels))
        number = shaped((), jnp.int32)
        return params, inputs, prepared, latents, features, number, number

    def _arguments(self, shaped: Any) -> tuple[Any, SamplingInputs]:
        """Parameters and arrays, each made by `shaped(shape, dtype)`."""
        model, plan = self.model, self.plan
        height, width = (side // model.vae.factor for side in self.size)
        params = {part: shaped_parameters(model, part, self.dtype, shaped, self.quantized) for part in DENOISING}
        latents = shaped((1, height, width, model.vae.latent_channels), jnp.float32)
        pooled = model.unet.pooled_dim

        def text(*shape: int) -> Text:
            context = shaped((*shape, model.text_encoders[0].positions, model.unet.context_dim), jnp.float32)
            return Text(context=context, pooled=None if pooled is None else shaped((*shape, pooled), jnp.float32))

        inputs = SamplingInputs(
            features=shaped((1, height, width, model.feature_channels), jnp.float32),
            text=text(1, len(plan.corners)) if self.tile_captions else text(1),
            negative=text(1) if self.options.guidance != 1 else None,
            noise=latents,
            start=latents if self.options.start == "lr" else None,
            step_noise=(
                shaped((plan.sampler.steps, *latents.shape), jnp.float32) if plan.sampler.needs_step_noise else None
            ),
            time_ids=shaped((len(plan.corners), 1, 6), jnp.float32),
            guidance=shaped((), jnp.float32) if self.options.guidance != 1 else None,
        )
        return params, inputs


def _swapped(program: Any, static: tuple[Any, ...], params: Any, *arrays: Any) -> Any:
    """A program that takes parameters, what is static and arrays, in the order for `functools.partial`."""
    return program(params, *static, *arrays)
