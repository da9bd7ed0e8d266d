"""A model directory whose parameters have learned nothing yet, for models that are trained from the start.

architecture + seed -> fresh_params -> write_model -> MODEL_DIR
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.tokenizers import Tokenizers
from faithdiff_jax.models.clip import TextEncoder
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import flatten, numbered
from faithdiff_jax.models.unet import UNet
from faithdiff_jax.models.vae import VAE
from faithdiff_jax.weights.initialisation import fresh_part
from faithdiff_jax.weights.model_directory import Contents, ModelDirectory

Arrays = dict[str, np.ndarray]
"""Dotted path -> array, for one part."""

# The ends of residual branches, and of the UNet: zero, so that networks start short.
_UNET_ZEROS = ("conv2.kernel", "proj_out.kernel", "conv_out.kernel")
_VAE_ZEROS = ("conv2.kernel", "to_out.kernel")
_LOG_VARIANCE = -6.0


def fresh_params(config: FaithDiffConfig, seed: int) -> dict[str, Arrays]:
    """The parameters of every part, by part name, float32.

    The LQ encoder is a copy of the VAE's encoder and the aligner starts as published. In UNet and VAE the ends of the
    residual branches are zero, and the UNet's last layer (as in Ho et al. 2020's code). The VAE's latents start with
    little noise of their own. Token embeddings have unit variance, which is what the UNet sees of a text encoder that
    is never trained. The rest is as the layers start by themselves.
    """
    unet = _with_zeros(_parameters(UNet(config.unet, rngs=nnx.Rngs(_key(seed, "unet")))), _UNET_ZEROS)
    vae = _with_zeros(_parameters(VAE(config.vae, rngs=nnx.Rngs(_key(seed, "vae")))), _VAE_ZEROS)
    is_log_variance = np.arange(2 * config.vae.latent_channels) >= config.vae.latent_channels
    vae["quant_conv.bias"] = np.where(is_log_variance, np.float32(_LOG_VARIANCE), np.float32(0))
    params = {"vae": vae, "unet": unet}
    params |= {part: fresh_part(config, part, vae, seed) for part in ("alignment", "lq_encoder")}
    for name, encoder in zip(_text_names(config), config.text_encoders, strict=True):
        text = _parameters(TextEncoder(encoder, rngs=nnx.Rngs(_key(seed, name))))
        rng = np.random.default_rng([seed, *name.encode()])
        tokens = text["token_embedding.embedding"]
        text["token_embedding.embedding"] = rng.standard_normal(tokens.shape).astype(np.float32)
        params[name] = text
    return params


def write_model(
    config: FaithDiffConfig,
    params: Mapping[str, Mapping[str, np.ndarray]],
    tokenizers_from: pathlib.Path | str,
    output: pathlib.Path | str,
    provenance: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Write a model directory from parameters in memory, whole or not at all.

    Args:
        config: the architecture.
        params: part name -> dotted path -> array; every part of the architecture, exactly.
        tokenizers_from: a folder with a `tokenizer/` for each text encoder.
        output: the model directory; it must not exist, or be empty.
        provenance: plain data on where the parameters are from; the package's version is added.
        defaults: the model's own defaults of restoring, plain data.

    Raises:
        ValueError: parameters that are not the architecture's.
        InputError: an output that exists or cannot be written, or tokenizers that do not fit.
    """
    check_tokenizers(config, tokenizers_from)
    parts = {part: Contents.of(arrays) for part, arrays in params.items()}
    ModelDirectory.write(output, config, parts, tokenizers=tokenizers_from, provenance=provenance, defaults=defaults)


def check_tokenizers(config: FaithDiffConfig, folder: pathlib.Path | str) -> None:
    """See that there is a tokenizer for each text encoder whose tokens and end token are the encoder's; InputError."""
    for path, encoder in zip(_tokenizer_folders(config, folder), config.text_encoders, strict=True):
        ids = Tokenizers.load([path])(["a"])[0]
        if ids.max() >= encoder.vocab_size or encoder.end_token not in ids:
            raise InputError(
                f"{path}: its tokens do not fit the text encoder's vocab_size, {encoder.vocab_size}, and end_token, "
                f"{encoder.end_token}"
            )


def _tokenizer_folders(config: FaithDiffConfig, folder: pathlib.Path | str) -> list[pathlib.Path]:
    return [pathlib.Path(folder) / name for name in numbered("tokenizer", len(config.text_encoders))]


def _text_names(config: FaithDiffConfig) -> tuple[str, ...]:
    return numbered("text_encoder", len(config.text_encoders))


def _parameters(module: nnx.Module) -> Arrays:
    state = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return {path: np.asarray(leaf) for path, leaf in flatten(state).items()}


def _with_zeros(arrays: Arrays, ends: tuple[str, ...]) -> Arrays:
    return {path: np.zeros_like(array) if path.endswith(ends) else array for path, array in arrays.items()}


def _key(seed: int, name: str) -> jax.Array:
    """A key for each part, so that one part's size does not bear on another's numbers."""
    return jax.random.fold_in(jax.random.key(seed), int.from_bytes(name.encode()[-4:], "big"))
