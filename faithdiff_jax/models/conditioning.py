"""The module that brings LQ features to the UNet, of the kind that a model's configuration names."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from faithdiff_jax.models.alignment import Addition, Alignment, AlignmentConfig
from faithdiff_jax.models.controlnet import ControlNet
from faithdiff_jax.models.controlnet_xs import ControlNetXS
from faithdiff_jax.models.sft import SFTControlNet
from faithdiff_jax.models.steering import Steerer
from faithdiff_jax.models.unet_config import UNetConfig


def make_alignment(
    config: AlignmentConfig,
    unet: UNetConfig,
    feature_channels: int | None,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
) -> Alignment | Addition | Steerer:
    """The module of the config's kind, between features of `feature_channels` and the UNet.

    None stands for features that a steerer's own encoder has embedded already (`lq_features` "hint").
    """
    if config.kind == "controlnet":
        return ControlNet(unet, feature_channels, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
    if config.kind == "controlnet_xs":
        return ControlNetXS(config.xs, unet, feature_channels, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
    if config.kind == "sft":
        return SFTControlNet(unet, feature_channels, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
    if feature_channels is None:
        raise ValueError(f"kind is {config.kind!r}: embeds the features itself, needs their channels")
    if config.kind == "add":
        return Addition(feature_channels, unet.channels[0], rngs=rngs, dtype=dtype, param_dtype=param_dtype)
    return Alignment(config, feature_channels, unet.channels[0], rngs=rngs, dtype=dtype, param_dtype=param_dtype)
