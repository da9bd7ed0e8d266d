"""The convolutional blocks that the UNet and the VAE share. All arrays are (B, H, W, C)."""

import jax
import jax.numpy as jnp
from flax import nnx


def conv3x3(in_channels: int, out_channels: int, *, rngs: nnx.Rngs, **kernel) -> nnx.Conv:
    """A 3x3 convolution that keeps the size: one pixel of zeros on every side."""
    return nnx.Conv(in_channels, out_channels, (3, 3), padding=1, rngs=rngs, **kernel)


def group_norm(channels: int, groups: int, epsilon: float, *, rngs: nnx.Rngs, **kernel) -> nnx.GroupNorm:
    """Group normalisation with its statistics in float32 and an exact (two-pass) variance."""
    return nnx.GroupNorm(channels, num_groups=groups, epsilon=epsilon, use_fast_variance=False, rngs=rngs, **kernel)


class ResnetBlock(nnx.Module):
    """norm, SiLU, conv, (+ time), norm, SiLU, conv, + input; a 1x1 convolution fits the input's channels if need be.

    `embedding_dim` None leaves the time embedding out, as the VAE does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_dim: int | None,
        groups: int,
        epsilon: float,
        rngs: nnx.Rngs,
        **kernel,
    ):
        self.norm1 = group_norm(in_channels, groups, epsilon, rngs=rngs, **kernel)
        self.conv1 = conv3x3(in_channels, out_channels, rngs=rngs, **kernel)
        self.time_emb_proj = nnx.Linear(embedding_dim, out_channels, rngs=rngs, **kernel) if embedding_dim else None
        self.norm2 = group_norm(out_channels, groups, epsilon, rngs=rngs, **kernel)
        self.conv2 = conv3x3(out_channels, out_channels, rngs=rngs, **kernel)
        fits = in_channels == out_channels
        self.conv_shortcut = None if fits else nnx.Conv(in_channels, out_channels, (1, 1), rngs=rngs, **kernel)

    def __call__(self, x: jax.Array, embedding: jax.Array | None = None) -> jax.Array:
        """(B, H, W, in), (B, embedding_dim) -> (B, H, W, out)."""
        hidden = self.conv1(nnx.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            assert embedding is not None, "this block needs a time embedding"
            hidden = hidden + self.time_emb_proj(nnx.silu(embedding))[:, None, None, :]
        hidden = self.conv2(nnx.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nnx.Module):
    """A stride-2 convolution. The UNet pads every side by one (`padding=1`), the VAE only right and bottom."""

    def __init__(self, channels: int, *, padding, rngs: nnx.Rngs, **kernel):
        self.conv = nnx.Conv(channels, channels, (3, 3), strides=2, padding=padding, rngs=rngs, **kernel)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H/2, W/2, C), halves rounded up (UNet) or down (VAE)."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling, cut to the wanted size, then a convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, **kernel):
        self.conv = conv3x3(channels, channels, rngs=rngs, **kernel)

    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        """(B, H, W, C) -> (B, 2H, 2W, C), or `size`, of which each side may be one less than double.

        Cutting the last row of a doubled image is what torch's nearest resize to an odd size gives.
        """
        height, width = size or (2 * x.shape[1], 2 * x.shape[2])
        doubled = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return self.conv(doubled[:, :height, :width])
