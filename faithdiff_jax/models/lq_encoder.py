"""The encoder of LQ pictures, of the kind that a model's configuration names.

penultimate   the VAE's encoder before its last norm and convolution: FaithDiff's (section 3.1)
last          all of the VAE's encoder: the paper's ablation
hint          ControlNet's few convolutions, which embed the picture for its copy of the UNet as well
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from faithdiff_jax.models.layers import Layers, run_block
from faithdiff_jax.models.vae import Encoder, EncoderConfig, FeatureEncoder

LQ_FEATURES = ("penultimate", "last", "hint")


class HintEncoder(nnx.Module):
    """Convolutions with SiLU, two for each halving of the size, then one that starts at zero.

    Of the configuration's fields `resnets_per_level` and `norm_groups` say nothing here. Source: Zhang et al. 2023
    (ControlNet), `ControlNetConditioningEmbedding` of diffusers.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        make = Layers(rngs, dtype, param_dtype)
        widths = config.channels
        self.conv_in = make.conv3x3(config.image_channels, widths[0])
        blocks = []
        for width, coarser in itertools.pairwise(widths):
            blocks += [make.conv3x3(width, width), make.conv3x3(width, coarser, stride=2)]
        self.blocks = nnx.List(blocks)
        self.conv_out = make.conv3x3(widths[-1], config.out_channels, zeros=True)

    @jax.named_scope("encoder")
    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w f"]:
        """(B, H, W, 3) in [-1, 1] -> (B, H/f, W/f, out_channels); ControlNet itself sees pictures in [0, 1]."""
        hidden = nnx.silu(run_block(self.conv_in, (images + 1) / 2))
        for block in self.blocks:
            hidden = nnx.silu(run_block(block, hidden))
        return self.conv_out(hidden)


def make_lq_encoder(
    config: EncoderConfig,
    lq_features: str,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
) -> FeatureEncoder | HintEncoder:
    """The encoder whose output are the features named, one of `LQ_FEATURES`."""
    encoders: dict[str, type[FeatureEncoder | HintEncoder]] = {
        "penultimate": FeatureEncoder,
        "last": Encoder,
        "hint": HintEncoder,
    }
    return encoders[lq_features](config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)


def feature_channels(config: EncoderConfig, lq_features: str) -> int:
    """Channels of what `make_lq_encoder`'s encoder puts out."""
    return config.channels[-1] if lq_features == "penultimate" else config.out_channels
