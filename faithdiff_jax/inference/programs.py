"""The compiled programs of a model: jitted pure functions of (parameters, arrays).

Parameters are passed in, so that a program works on any of the right shapes: loaded, trained, quantised or sharded.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from faithdiff_jax.diffusion import schedule
from faithdiff_jax.inference import denoise
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import Networks
from faithdiff_jax.sharding import batch_constraint


class Programs:
    """One attribute a program; each compiles once for every new shape. Results are float32.

    Attributes:
        encode_lq: (lq_encoder, images) -> features.
        moments: (vae, images) -> mean and log-variance of the latent.
        draw: (vae, moments, noise) -> scaled latent.
        decode: (vae, latents) -> images.
        encode_text: ([text encoders], [token ids]) -> context, pooled.
        predict_noise: ({unet, alignment}, latents, timesteps, features, context, pooled, time_ids) -> noise.
        sample: ({unet, alignment}, plan, ...) -> latents; see `denoise.sample`.
    """

    def __init__(self, config: FaithDiffConfig, *, dtype: Any = jnp.float32, mesh: Mesh | None = None):
        networks = Networks(config, dtype)
        constrain = batch_constraint(mesh)

        @jax.jit
        def encode_lq(params, images):
            return networks.lq_encoder(params)(constrain(images)).astype(jnp.float32)

        @jax.jit
        def moments(params, images):
            return networks.vae(params).moments(constrain(images)).astype(jnp.float32)

        @jax.jit
        def draw(params, moments, noise):
            return networks.vae(params).sample(moments, noise)

        @jax.jit
        def decode(params, latents):
            return networks.vae(params).decode(constrain(latents)).astype(jnp.float32)

        @jax.jit
        def encode_text(params, token_ids):
            context, pooled = networks.encode_text(params, token_ids)
            return context.astype(jnp.float32), pooled.astype(jnp.float32)

        @jax.jit
        def predict_noise(params, latents, timesteps, *arrays):
            output = networks.denoiser(params)(latents, timesteps, *arrays).astype(jnp.float32)
            return schedule.to_noise(config.schedule, output, latents, timesteps)

        @functools.partial(jax.jit, static_argnames="plan")
        def sample(params, plan, features, text, negative, noise, start, step_noise, time_ids, guidance, rescale):
            model = networks.denoiser(params)
            arrays = (features, text, negative, noise, start, step_noise, time_ids, guidance, rescale)
            return denoise.sample(model, plan, *arrays, constrain)

        self.encode_lq = encode_lq
        self.moments = moments
        self.draw = draw
        self.decode = decode
        self.encode_text = encode_text
        self.predict_noise = predict_noise
        self.sample = sample
