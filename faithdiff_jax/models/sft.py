"""ControlNet with spatial feature transforms: the copy's features scale and shift the UNet's, as in SUPIR.

    copy of the encoder half --> features
    kept on the way down + conv(features) --> concat behind those of the way up --> norm --> x (1 + scale) + shift
    before each enlargement: + attention of each position to the copy's features at all positions

Sources: Wang et al. 2018, "Recovering Realistic Texture in Image Super-resolution by Deep Spatial Feature Transform";
Yu et al. 2024, "Scaling Up to Excellence" (SUPIR), as its published code computes it. Norm and attention are there from
the start: a model with a new network is not the plain UNet, as one with a new aligner or ControlNet is.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from faithdiff_jax.models.controlnet import EncoderCopy
from faithdiff_jax.models.layers import Layers, run_block
from faithdiff_jax.models.reuse import TextSources
from faithdiff_jax.models.steering import Steering
from faithdiff_jax.models.transformer import MultiHeadAttention
from faithdiff_jax.models.unet_config import UNetConfig, skip_channels

SHARED_CHANNELS = 128


class SpatialFeatureTransform(nnx.Module):
    """Features normalised, scaled and shifted pixel by pixel, as another network's features say (SUPIR's ZeroSFT).

    Scale, shift and the sum before them start at zero.
    """

    def __init__(self, control: int, kept: int, hidden: int, groups: int, *, make: Layers):
        """Channels of the other network's features, of those from the way down, and of those of the way up, or 0."""
        self.zero_conv = make.conv1x1(control, kept, zeros=True)
        self.norm = make.group_norm(hidden + kept, groups, epsilon=1e-5)
        self.mlp_shared = make.conv3x3(control, SHARED_CHANNELS)
        self.zero_mul = make.conv3x3(SHARED_CHANNELS, hidden + kept, zeros=True)
        self.zero_add = make.conv3x3(SHARED_CHANNELS, hidden + kept, zeros=True)

    def __call__(
        self, control: Float[Array, "b h w d"], kept: Float[Array, "b h w s"], hidden: Float[Array, "b h w c"] | None
    ) -> Float[Array, "b h w cs"]:
        """(B, H, W, control), (B, H, W, kept), (B, H, W, hidden) or None -> (B, H, W, hidden + kept)."""
        features = kept + self.zero_conv(control)
        if hidden is not None:
            features = jnp.concatenate([hidden, features], axis=-1)
        shared = nnx.silu(self.mlp_shared(control))
        scaled: Array = self.norm(features) * (self.zero_mul(shared) + 1)
        return scaled + self.zero_add(shared)


class FeatureAttention(nnx.Module):
    """Attention to another network's features over all positions, added (SUPIR's ZeroCrossAttn, which is not zero)."""

    def __init__(self, control: int, hidden: int, heads: int, groups: int, *, make: Layers):
        self.norm1 = make.group_norm(hidden, groups, epsilon=1e-5)
        self.norm2 = make.group_norm(control, groups, epsilon=1e-5)
        self.attn = MultiHeadAttention(hidden, control, heads, make=make)

    def __call__(self, control: Float[Array, "b h w d"], hidden: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """(B, H, W, control), (B, H, W, hidden) -> (B, H, W, hidden)."""
        tokens, keys = (x.reshape(x.shape[0], -1, x.shape[-1]) for x in (self.norm1(hidden), self.norm2(control)))
        return hidden + self.attn(tokens, self.attn.keys_values(keys)).reshape(hidden.shape)


class SFTControlNet(EncoderCopy):
    """The copy of the encoder half, with a transform wherever the UNet takes what it kept on its way down."""

    def __init__(
        self,
        config: UNetConfig,
        feature_channels: int | None,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        make = Layers(rngs, dtype, param_dtype)
        super().__init__(config, feature_channels, make=make)
        widths, groups = config.channels, config.norm_groups
        kept = skip_channels(widths, config.resnets_per_level)
        self.middle = SpatialFeatureTransform(widths[-1], widths[-1], 0, groups, make=make)
        # In the order of the way up, as the UNet builds it.
        transforms, attentions, incoming, number = [], [], widths[-1], len(kept)
        for level in reversed(range(len(widths))):
            for _ in range(config.resnets_per_level + 1):
                number -= 1
                transforms.append(SpatialFeatureTransform(kept[number], kept[number], incoming, groups, make=make))
                incoming = widths[level]
            if level > 0 and config.transformer_depth[level]:
                attentions.append(FeatureAttention(kept[number], incoming, config.heads[level], groups, make=make))
        self.transforms = nnx.List(transforms)
        self.attentions = nnx.List(attentions)

    def steer(
        self,
        latents: Float[Array, "b h w z"],
        hidden: Float[Array, "kb h w c"],
        condition: Float[Array, "b h w d"],
        embedding: Float[Array, "kb e"],
        text: TextSources,
    ) -> tuple[Float[Array, "kb h w c"], Steering]:
        """Begin one evaluation: `hidden` stays as it is, the transforms come later."""
        with jax.named_scope("sft"):
            return hidden, _Transforms(self, self.encode(latents, condition, embedding, text))


class _Transforms(Steering):
    """Transforms the middle and each join, and attends before each enlargement."""

    def __init__(self, network: SFTControlNet, features: Sequence[Array]):
        self.network, (*self.features, self.of_middle) = network, features
        attentions, depths = iter(network.attentions), network.config.transformer_depth
        self.attentions = iter([next(attentions) if depth else None for depth in reversed(depths[1:])])

    @jax.named_scope("sft")
    def middle(self, before: Float[Array, "b h w c"], after: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return run_block(self.network.middle, self.of_middle, after, None)

    @jax.named_scope("sft")
    def join(
        self, number: int, hidden: Float[Array, "b h w c"], skip: Float[Array, "b h w s"]
    ) -> Float[Array, "b h w cs"]:
        return run_block(self.network.transforms[-1 - number], self.features[number], skip, hidden)

    @jax.named_scope("sft")
    def enlarge(self, number: int, hidden: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        attention = next(self.attentions)
        return hidden if attention is None else run_block(attention, self.features[number], hidden)
