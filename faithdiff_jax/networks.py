"""The networks of a model as graphs without parameters, to be merged with those that a program is given.

parameters (nested dicts) -> modules, inside jit
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from faithdiff_jax.config import FaithDiffConfig
from faithdiff_jax.models.clip import TextEncoder
from faithdiff_jax.models.faithdiff import Denoiser
from faithdiff_jax.models.vae import VAE, FeatureEncoder, make_lq_encoder
from faithdiff_jax.weights.keymap import Params


class Networks:
    """Modules that compute in `dtype` on parameters of any dtype: of the part that a method is named for."""

    def __init__(self, config: FaithDiffConfig, dtype: Any):
        graph = functools.partial(_graph, dtype=dtype, param_dtype=dtype)
        self._lq_encoder = graph(make_lq_encoder, config.vae, config.lq_features)
        self._vae = graph(VAE, config.vae)
        self._denoiser = graph(Denoiser, config.unet, config.alignment, config.vae, config.lq_features)
        self._text_encoders = [graph(TextEncoder, encoder) for encoder in config.text_encoders]

    def lq_encoder(self, params: Params) -> FeatureEncoder:
        """Images to LQ features."""
        return nnx.merge(self._lq_encoder, params)

    def vae(self, params: Params) -> VAE:
        """Images to latents and back."""
        return nnx.merge(self._vae, params)

    def denoiser(self, params: Params) -> Denoiser:
        """Aligner and UNet, from {"unet": ..., "alignment": ...}."""
        return nnx.merge(self._denoiser, params)

    def encode_text(self, params: Sequence[Params], token_ids: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Token ids (B, 77), for each text encoder as its parameters -> context (B, 77, D) and pooled (B, P)."""
        encoders = [nnx.merge(graph, part) for graph, part in zip(self._text_encoders, params, strict=True)]
        outputs = [encoder(ids) for encoder, ids in zip(encoders, token_ids, strict=True)]
        return jnp.concatenate([hidden for hidden, _ in outputs], axis=-1), outputs[-1][1]


def _graph(module: Callable[..., nnx.Module], *configs, **options) -> nnx.GraphDef:
    """The structure of a module without its parameters, which no memory is spent on."""
    return nnx.split(nnx.eval_shape(lambda: module(*configs, rngs=nnx.Rngs(0), **options)))[0]
