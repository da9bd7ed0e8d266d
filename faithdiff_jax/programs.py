"""The compiled programs of a model: jitted pure functions of (parameters, arrays).

Modules live here as graphs without parameters and are merged with those that are passed in, so that a program works
on any parameters of the right shapes: loaded, trained, quantised or sharded.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from faithdiff_jax import sampling
from faithdiff_jax.config import FaithDiffConfig
from faithdiff_jax.models.clip import TextEncoder
from faithdiff_jax.models.faithdiff import Denoiser
from faithdiff_jax.models.vae import VAE, FeatureEncoder
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
        sample: ({unet, alignment}, plan, ...) -> latents; see `sampling.sample`.
    """

    def __init__(self, config: FaithDiffConfig, *, dtype: Any = jnp.float32, mesh: Mesh | None = None):
        graph = functools.partial(_graph, dtype=dtype, param_dtype=dtype)
        lq_encoder = graph(FeatureEncoder, config.vae)
        vae = graph(VAE, config.vae)
        denoiser = graph(Denoiser, config.unet, config.alignment, config.vae)
        text_encoders = [graph(TextEncoder, encoder) for encoder in config.text_encoders]
        constrain = batch_constraint(mesh)

        @jax.jit
        def encode_lq(params, images):
            return nnx.merge(lq_encoder, params)(constrain(images)).astype(jnp.float32)

        @jax.jit
        def moments(params, images):
            return nnx.merge(vae, params).moments(constrain(images)).astype(jnp.float32)

        @jax.jit
        def draw(params, moments, noise):
            return nnx.merge(vae, params).sample(moments, noise)

        @jax.jit
        def decode(params, latents):
            return nnx.merge(vae, params).decode(constrain(latents)).astype(jnp.float32)

        @jax.jit
        def encode_text(params, token_ids):
            encoders = [nnx.merge(encoder, part) for encoder, part in zip(text_encoders, params, strict=True)]
            outputs = [encoder(ids) for encoder, ids in zip(encoders, token_ids, strict=True)]
            context = jnp.concatenate([hidden for hidden, _ in outputs], axis=-1)
            return context.astype(jnp.float32), outputs[-1][1].astype(jnp.float32)

        @jax.jit
        def predict_noise(params, *arrays):
            return nnx.merge(denoiser, params)(*arrays).astype(jnp.float32)

        @functools.partial(jax.jit, static_argnames="plan")
        def sample(params, plan, features, text, negative, noise, start, step_noise, time_ids, guidance, rescale):
            model = nnx.merge(denoiser, params)
            arrays = (features, text, negative, noise, start, step_noise, time_ids, guidance, rescale)
            return sampling.sample(model, plan, *arrays, constrain)

        self.encode_lq = encode_lq
        self.moments = moments
        self.draw = draw
        self.decode = decode
        self.encode_text = encode_text
        self.predict_noise = predict_noise
        self.sample = sample


def _graph(module: Callable[..., nnx.Module], *configs, **options) -> nnx.GraphDef:
    """The structure of a module without its parameters, which no memory is spent on."""
    return nnx.split(nnx.eval_shape(lambda: module(*configs, rngs=nnx.Rngs(0), **options)))[0]
