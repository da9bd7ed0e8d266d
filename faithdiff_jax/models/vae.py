"""The SDXL autoencoder, and the LQ encoder that FaithDiff cuts out of it.

    image --Encoder--> moments --sample, x scaling--> latent --Decoder--> image
    image --FeatureEncoder--> features before the encoder's last norm and convolution (FaithDiff's LQ features)

The paper's ablation takes the last layer's features instead: its LQ encoder is a whole `Encoder`.

Images are (B, H, W, 3) in [-1, 1], latents (B, H/f, W/f, latent_channels) with f = 2 ** (levels - 1).
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from faithdiff_jax.models.attention import attention
from faithdiff_jax.models.blocks import Downsample, ResnetBlock, Upsample
from faithdiff_jax.models.layers import Layers, run_block
from faithdiff_jax.models.sizes import LARGEST_WIDTH, MOST_LAYERS, check_levels, check_sizes

EPSILON = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelsConfig:
    """What image encoders and decoders have in common; the defaults are SDXL's."""

    image_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 512, 512)
    resnets_per_level: int = 2
    norm_groups: int = 32

    def __post_init__(self) -> None:
        check_levels(self.channels)
        check_sizes(self, 1, LARGEST_WIDTH, "image_channels", "channels", "norm_groups")
        check_sizes(self, 1, MOST_LAYERS, "resnets_per_level")
        for width in self.channels:
            if width % self.norm_groups:
                raise ValueError(f"channels has {width}: must be a multiple of norm_groups, {self.norm_groups}")

    @property
    def factor(self) -> int:
        """Image pixels per pixel of the coarsest level, per side."""
        return 1 << (len(self.channels) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(LevelsConfig):
    """Sizes of an image encoder, the VAE's or the LQ encoder."""

    out_channels: int = 8
    """Of the last convolution, which a `FeatureEncoder` does not have: mean and log-variance of the latent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, 1, LARGEST_WIDTH, "out_channels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig(LevelsConfig):
    """Sizes of the autoencoder."""

    latent_channels: int = 4
    scaling_factor: float = 0.13025
    """Latents are multiplied by it, so that the diffusion sees unit variance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, 1, LARGEST_WIDTH // 2, "latent_channels")
        if not 0 < self.scaling_factor < math.inf:
            raise ValueError(f"scaling_factor is {self.scaling_factor}: must be a finite number above 0")

    @property
    def decoder_reach(self) -> int:
        """How far, in latent pixels, the decoder's convolutions look to each side."""
        levels = len(self.channels)
        inside = 1 + 4  # the first convolution and the two blocks in the middle
        up = math.fsum((2 * (self.resnets_per_level + 1) + (level > 0)) / 2**level for level in range(levels))
        return math.ceil(inside + up + 0.5 ** (levels - 1))

    @property
    def encoder(self) -> EncoderConfig:
        """The encoder's sizes."""
        return EncoderConfig(
            image_channels=self.image_channels,
            channels=self.channels,
            resnets_per_level=self.resnets_per_level,
            norm_groups=self.norm_groups,
            out_channels=2 * self.latent_channels,
        )


class PixelAttention(nnx.Module):
    """One attention head over all pixels of a feature map, added to it."""

    def __init__(self, channels: int, groups: int, *, make: Layers):
        self.group_norm = make.group_norm(channels, groups, epsilon=EPSILON)
        self.to_q = make.linear(channels, channels)
        self.to_k = make.linear(channels, channels)
        self.to_v = make.linear(channels, channels)
        self.to_out = make.linear(channels, channels)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """(B, H, W, C) -> (B, H, W, C)."""
        tokens = self.group_norm(x).reshape(x.shape[0], -1, 1, x.shape[-1])
        mixed = attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out(mixed).reshape(x.shape)


class VAELevel(nnx.Module):
    """The ResNet blocks of one level and the change of size behind them."""

    def __init__(self, resnets: Sequence[ResnetBlock], resample: Downsample | Upsample | None):
        self.resnets = nnx.List(resnets)
        self.resample = resample

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """(B, H, W, in) -> (B, H', W', out)."""
        for resnet in self.resnets:
            x = run_block(resnet, x)
        return x if self.resample is None else self.resample(x)


class MidBlock(nnx.Module):
    """ResNet block, attention, ResNet block, at the coarsest level."""

    def __init__(self, channels: int, groups: int, *, make: Layers):
        self.resnets = nnx.List([_resnet(channels, channels, groups, make) for _ in range(2)])
        self.attention = PixelAttention(channels, groups, make=make)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """(B, H, W, C) -> (B, H, W, C)."""
        for block in (self.resnets[0], self.attention, self.resnets[1]):
            x = run_block(block, x)
        return x


class FeatureEncoder(nnx.Module):
    """The VAE encoder without its last norm and convolution: FaithDiff's LQ encoder (section 3.1)."""

    def __init__(
        self,
        config: EncoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        make = Layers(rngs, dtype, param_dtype)
        widths, groups = config.channels, config.norm_groups
        self.conv_in = make.conv3x3(config.image_channels, widths[0])
        levels = []
        for level, width in enumerate(widths):
            below = widths[max(level - 1, 0)]
            resnets = [
                _resnet(below if i == 0 else width, width, groups, make) for i in range(config.resnets_per_level)
            ]
            last = level == len(widths) - 1
            resample = None if last else Downsample(width, padding=((0, 1), (0, 1)), make=make)
            levels.append(VAELevel(resnets, resample))
        self.down_blocks = nnx.List(levels)
        self.mid_block = MidBlock(widths[-1], groups, make=make)

    @jax.named_scope("encoder")
    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w f"]:
        """(B, H, W, 3) in [-1, 1] -> (B, H/f, W/f, channels[-1])."""
        hidden = self.conv_in(images)
        for level in self.down_blocks:
            hidden = level(hidden)
        return self.mid_block(hidden)


class Encoder(FeatureEncoder):
    """The whole VAE encoder: features, then mean and log-variance of the latent."""

    def __init__(
        self,
        config: EncoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        super().__init__(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        make = Layers(rngs, dtype, param_dtype)
        self.conv_norm_out = make.group_norm(config.channels[-1], config.norm_groups, epsilon=EPSILON)
        self.conv_out = make.conv3x3(config.channels[-1], config.out_channels)

    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w f"]:
        """(B, H, W, 3) in [-1, 1] -> (B, H/f, W/f, out_channels)."""
        return self.conv_out(nnx.silu(self.conv_norm_out(super().__call__(images))))


class Decoder(nnx.Module):
    """The VAE decoder: the encoder's mirror image with one more ResNet block per level."""

    def __init__(
        self,
        config: VAEConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        make = Layers(rngs, dtype, param_dtype)
        widths, groups = config.channels, config.norm_groups
        self.conv_in = make.conv3x3(config.latent_channels, widths[-1])
        self.mid_block = MidBlock(widths[-1], groups, make=make)
        levels, incoming = [], widths[-1]
        for level in reversed(range(len(widths))):
            resnets = []
            for _ in range(config.resnets_per_level + 1):
                resnets.append(_resnet(incoming, widths[level], groups, make))
                incoming = widths[level]
            levels.append(VAELevel(resnets, Upsample(incoming, make=make) if level > 0 else None))
        self.up_blocks = nnx.List(levels)
        self.conv_norm_out = make.group_norm(widths[0], groups, epsilon=EPSILON)
        self.conv_out = make.conv3x3(widths[0], config.image_channels)

    def __call__(self, hidden: Float[Array, "b h w c"]) -> Float[Array, "b H W i"]:
        """(B, h, w, latent_channels) -> (B, h * f, w * f, 3)."""
        hidden = self.mid_block(self.conv_in(hidden))
        for level in self.up_blocks:
            hidden = level(hidden)
        return self.conv_out(nnx.silu(self.conv_norm_out(hidden)))


class VAE(nnx.Module):
    """Images to latents of unit variance and back. Source: Rombach et al. 2022, with SDXL's weights and scale."""

    def __init__(
        self,
        config: VAEConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config = config
        make = Layers(rngs, dtype, param_dtype)
        self.encoder = Encoder(config.encoder, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.quant_conv = make.conv1x1(2 * config.latent_channels, 2 * config.latent_channels)
        self.post_quant_conv = make.conv1x1(config.latent_channels, config.latent_channels)
        self.decoder = Decoder(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    def moments(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w m"]:
        """(B, H, W, 3) in [-1, 1] -> (B, H/f, W/f, 2 * latent_channels): mean and log-variance, unscaled."""
        return self.quant_conv(self.encoder(images))

    def sample(self, moments: Float[Array, "b h w m"], noise: Float[Array, "b h w z"]) -> Float32[Array, "b h w z"]:
        """Draw the latent that standard normal `noise` (B, h, w, latent_channels) picks, and scale it, in float32."""
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        deviation = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
        return (mean + deviation * noise) * self.config.scaling_factor

    def encode(self, images: Float[Array, "b H W c"], noise: Float[Array, "b h w z"]) -> Float32[Array, "b h w z"]:
        """Images in [-1, 1] and standard normal noise -> scaled latents (B, H/f, W/f, latent_channels)."""
        return self.sample(self.moments(images), noise)

    @jax.named_scope("decoder")
    def decode(self, latents: Float[Array, "b h w z"]) -> Float[Array, "b H W c"]:
        """Scaled latents (B, h, w, latent_channels) -> images (B, h * f, w * f, 3), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))


def _resnet(in_channels: int, out_channels: int, groups: int, make: Layers) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, embedding_dim=None, groups=groups, epsilon=EPSILON, make=make)
