"""ControlNet-XS: a narrow encoder beside the UNet's, and the two tell each other what they find at every block.

    UNet      features --------------> block --> + --> ...             on the way up:  + --> join
                  | 1x1                          ^ 1x1                                 ^ 1x1
    beside it  features --> concat --> block ----+---> ... (kept) ---------------------+

All 1x1 convolutions between the two start at zero. Source: Zavadski et al. 2024, "ControlNet-XS: Rethinking the Control
of Text-to-Image Diffusion Models as Feedback-Control Systems", as `UNetControlNetXSModel` of diffusers computes it.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Real

from faithdiff_jax.models.blocks import Downsample, ResnetBlock
from faithdiff_jax.models.encoder_half import EmbeddingMLP, sinusoidal_embedding
from faithdiff_jax.models.layers import Layers, run_block
from faithdiff_jax.models.reuse import TextKeysValues, TextSources
from faithdiff_jax.models.sizes import LARGEST_WIDTH, check_levels, check_sizes
from faithdiff_jax.models.steering import Steerer, Steering
from faithdiff_jax.models.transformer import SpatialTransformer
from faithdiff_jax.models.unet_config import UNetConfig, skip_channels

MIDDLE_GROUPS = 32  # at most, whatever the UNet's are
MIX_EXPONENT = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlNetXSConfig:
    """Sizes of the encoder beside the UNet's, level by level; the defaults are a tenth of SDXL's, heads 64 wide."""

    channels: tuple[int, ...] = (32, 64, 128)
    heads: tuple[int, ...] = (1, 1, 2)
    time_embedding_mix: float | None = None
    """How much of an embedding of timesteps of its own is mixed into the UNet's, 0 to 1; None for none."""

    def __post_init__(self) -> None:
        check_levels(self.channels)
        check_sizes(self, 1, LARGEST_WIDTH, "channels", "heads")
        if len(self.heads) != len(self.channels):
            raise ValueError(f"heads is {self.heads}: needs one number per level, {len(self.channels)} as in channels")
        for width, heads in zip(self.channels, self.heads, strict=True):
            if width % heads:
                raise ValueError(f"heads has {heads}: must divide its level's channels, {width}")
        if self.time_embedding_mix is not None and not 0 <= self.time_embedding_mix <= 1:
            raise ValueError(f"time_embedding_mix is {self.time_embedding_mix}: must be from 0 to 1, or null")


class XSLevel(nnx.Module):
    """One level beside the UNet's, with what goes over before and behind each block and change of size."""

    def __init__(self, config: ControlNetXSConfig, unet: UNetConfig, level: int, *, make: Layers):
        width, base = config.channels[level], unet.channels[level]
        below = max(level - 1, 0)
        resnets, attentions, base_to_ctrl = [], [], []
        incoming, base_incoming = config.channels[below], unet.channels[below]
        for _ in range(unet.resnets_per_level):
            base_to_ctrl.append(make.conv1x1(base_incoming, base_incoming, zeros=True))
            resnets.append(
                ResnetBlock(
                    incoming + base_incoming,
                    width,
                    embedding_dim=unet.embedding_dim,
                    groups=_groups(incoming + base_incoming, unet.norm_groups),
                    out_groups=_groups(width, unet.norm_groups),
                    epsilon=1e-5,
                    make=make,
                )
            )
            if depth := unet.transformer_depth[level]:
                groups, heads = _groups(width, unet.norm_groups), config.heads[level]
                attentions.append(SpatialTransformer(width, unet.context_dim, heads, depth, groups=groups, make=make))
            incoming, base_incoming = width, base
        last = level == len(unet.channels) - 1
        if not last:
            base_to_ctrl.append(make.conv1x1(base, base, zeros=True))
        self.resnets, self.attentions = nnx.List(resnets), nnx.List(attentions)
        self.base_to_ctrl = nnx.List(base_to_ctrl)
        self.ctrl_to_base = nnx.List([make.conv1x1(width, base, zeros=True) for _ in base_to_ctrl])
        self.resample = None if last else Downsample(width + base, width, padding=1, make=make)


class XSMiddle(nnx.Module):
    """The block beside the UNet's middle."""

    def __init__(self, config: ControlNetXSConfig, unet: UNetConfig, *, make: Layers):
        width, base = config.channels[-1], unet.channels[-1]
        groups = _groups(math.gcd(width, width + base), MIDDLE_GROUPS)
        self.base_to_ctrl = make.conv1x1(base, base, zeros=True)
        # As published, with another epsilon than on the way down.
        self.resnets = nnx.List(
            [
                ResnetBlock(incoming, width, embedding_dim=unet.embedding_dim, groups=groups, epsilon=1e-6, make=make)
                for incoming in (width + base, width)
            ]
        )
        depth, heads = unet.mid_transformer_depth, config.heads[-1]
        self.attentions = nnx.List(
            [SpatialTransformer(width, unet.context_dim, heads, depth, groups=groups, make=make)]
        )
        self.ctrl_to_base = make.conv1x1(width, base, zeros=True)


class XSConnections(nnx.Module):
    """What one level of the UNet's way up is told before each of its ResNet blocks."""

    def __init__(self, widths: Sequence[int], base: Sequence[int], *, make: Layers):
        self.ctrl_to_base = nnx.List(
            [make.conv1x1(width, to, zeros=True) for width, to in zip(widths, base, strict=True)]
        )


class ControlNetXS(Steerer):
    """The encoder beside the UNet's."""

    def __init__(
        self,
        config: ControlNetXSConfig,
        unet: UNetConfig,
        feature_channels: int | None,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        make = Layers(rngs, dtype, param_dtype)
        self.config, self.unet = config, unet
        width, levels = config.channels[0], len(unet.channels)
        super().__init__(feature_channels, width, make=make)
        self.conv_in = make.conv3x3(unet.in_channels, width)
        self.control_to_base_for_conv_in = make.conv1x1(width, unet.channels[0], zeros=True)
        mixed = config.time_embedding_mix is not None
        self.time_embedding = EmbeddingMLP(unet.channels[0], unet.embedding_dim, make=make) if mixed else None
        self.down_blocks = nnx.List([XSLevel(config, unet, level, make=make) for level in range(levels)])
        self.mid_block = XSMiddle(config, unet, make=make)

        skips = skip_channels(config.channels, unet.resnets_per_level)
        connections, incoming = [], unet.channels[-1]
        for level in reversed(range(levels)):
            base = [incoming, *[unet.channels[level]] * unet.resnets_per_level]
            connections.append(XSConnections([skips.pop() for _ in base], base, make=make))
            incoming = unet.channels[level]
        self.up_connections = nnx.List(connections)

    def embed_timesteps(self, timesteps: Real[Array, "b"], of_unet: Float[Array, "b e"]) -> Float[Array, "b e"]:
        """The UNet's embedding (B, E), with that of its own mixed in."""
        if self.time_embedding is None or self.config.time_embedding_mix is None:
            return of_unet
        own = self.time_embedding(sinusoidal_embedding(timesteps, self.unet.channels[0]))
        share: float = self.config.time_embedding_mix**MIX_EXPONENT
        return share * own + (1 - share) * of_unet

    def project_text(self, context: Float[Array, "b m d"]) -> TextKeysValues:
        """(B, M, context_dim) -> keys and values for each of its transformers: down, the middle."""
        transformers = [transformer for level in self.down_blocks for transformer in level.attentions]
        return [transformer.project_text(context) for transformer in (*transformers, *self.mid_block.attentions)]

    def steer(
        self,
        latents: Float[Array, "b h w z"],
        hidden: Float[Array, "kb h w c"],
        condition: Float[Array, "b h w d"],
        embedding: Float[Array, "kb e"],
        text: TextSources,
    ) -> tuple[Float[Array, "kb h w c"], Steering]:
        """Begin one evaluation: the first convolutions' results, and what goes on beside the UNet from there."""
        with jax.named_scope("controlnet_xs"):
            own = self.conv_in(latents) + condition
            own = jnp.tile(own, (embedding.shape[0] // latents.shape[0], 1, 1, 1))
            hidden = hidden + self.control_to_base_for_conv_in(own)
            return hidden, _Beside(self, own, embedding.astype(hidden.dtype), text)


class _Beside(Steering):
    """Goes through the encoder beside the UNet's as the UNet is gone through."""

    def __init__(self, network: ControlNetXS, own: Array, embedding: Array, text: TextSources):
        self.network, self.embedding = network, embedding
        self.kept = [own]
        self.texts = iter(text)
        levels = network.down_blocks
        self.blocks = [(level, i) for level in levels for i in range(len(level.ctrl_to_base))]
        # By the number of what is kept: the way up begins with the last.
        self.connections = [to_base for level in network.up_connections for to_base in level.ctrl_to_base][::-1]

    @jax.named_scope("controlnet_xs")
    def down(
        self, number: int, before: Float[Array, "b _ _ _"], after: Float[Array, "b h w c"]
    ) -> Float[Array, "b h w c"]:
        level, i = self.blocks[number - 1]
        own = jnp.concatenate([self.kept[-1], level.base_to_ctrl[i](before)], axis=-1)
        if i == len(level.resnets):
            assert level.resample is not None, "what follows the ResNet blocks is a change of size"
            own = level.resample(own)
        else:
            own = run_block(level.resnets[i], own, self.embedding)
            if level.attentions:
                own = level.attentions[i](own, next(self.texts))
        self.kept.append(own)
        return after + level.ctrl_to_base[i](own)

    @jax.named_scope("controlnet_xs")
    def middle(self, before: Float[Array, "b h w c"], after: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        block = self.network.mid_block
        own = jnp.concatenate([self.kept[-1], block.base_to_ctrl(before)], axis=-1)
        own = block.attentions[0](run_block(block.resnets[0], own, self.embedding), next(self.texts))
        return after + block.ctrl_to_base(run_block(block.resnets[1], own, self.embedding))

    @jax.named_scope("controlnet_xs")
    def join(
        self, number: int, hidden: Float[Array, "b h w c"], skip: Float[Array, "b h w s"]
    ) -> Float[Array, "b h w cs"]:
        return super().join(number, hidden + self.connections[number](self.kept[number]), skip)


def _groups(channels: int, most: int) -> int:
    """The largest number of groups, at most so many, that divides the channels."""
    return max(count for count in range(1, most + 1) if channels % count == 0)
