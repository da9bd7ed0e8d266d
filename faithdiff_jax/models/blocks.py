"""The convolutional blocks that the UNet and the VAE share. All arrays are (B, H, W, C)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from faithdiff_jax.models.layers import Layers, Padding


class ResnetBlock(nnx.Module):
    """norm, SiLU, conv, (+ time), norm, SiLU, conv, + input; a 1x1 convolution fits the input's channels if need be.

    `embedding_dim` None leaves the time embedding out, as the VAE does. `out_groups` are those of the second norm,
    where they differ.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_dim: int | None,
        groups: int,
        out_groups: int | None = None,
        epsilon: float,
        make: Layers,
    ):
        self.norm1 = make.group_norm(in_channels, groups, epsilon=epsilon)
        self.conv1 = make.conv3x3(in_channels, out_channels)
        self.time_emb_proj = None if embedding_dim is None else make.linear(embedding_dim, out_channels)
        self.norm2 = make.group_norm(out_channels, out_groups or groups, epsilon=epsilon)
        self.conv2 = make.conv3x3(out_channels, out_channels)
        fits = in_channels == out_channels
        self.conv_shortcut = None if fits else make.conv1x1(in_channels, out_channels)

    def __call__(
        self, x: Float[Array, "b h w i"], embedding: Float[Array, "b e"] | None = None
    ) -> Float[Array, "b h w o"]:
        """(B, H, W, in), (B, embedding_dim) -> (B, H, W, out)."""
        hidden = self.conv1(nnx.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            assert embedding is not None, "this block needs a time embedding"
            hidden = hidden + self.time_emb_proj(nnx.silu(embedding))[:, None, None, :]
        hidden = self.conv2(nnx.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nnx.Module):
    """A stride-2 convolution. The UNet pads every side by one (`padding=1`), the VAE only right and bottom."""

    def __init__(self, channels: int, out_channels: int | None = None, *, padding: Padding, make: Layers):
        self.conv = make.conv3x3(channels, out_channels or channels, stride=2, padding=padding)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """(B, H, W, C) -> (B, H/2, W/2, out_channels or C), halves rounded up (UNet) or down (VAE)."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling, cut to the wanted size, then a convolution."""

    def __init__(self, channels: int, *, make: Layers):
        self.conv = make.conv3x3(channels, channels)

    def __call__(self, x: Float[Array, "b h w c"], size: tuple[int, int] | None = None) -> Float[Array, "b h2 w2 c"]:
        """(B, H, W, C) -> (B, 2H, 2W, C), or `size`, of which each side may be one less than double.

        Cutting the last row of a doubled image is what torch's nearest resize to an odd size gives.
        """
        height, width = size or (2 * x.shape[1], 2 * x.shape[2])
        doubled = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return self.conv(doubled[:, :height, :width])
