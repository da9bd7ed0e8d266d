"""RRDBNet: the network of ESRGAN, Real-ESRGAN, BSRGAN and BSRNet, which differ in their weights.

    picture -> pixel unshuffle (x2, x1 models) -> conv -> 23 RRDB blocks, scanned -> conv, + -> twice as large, once or
    twice -> conv -> conv -> picture

Arrays are (B, H, W, C), pictures in [0, 1]. Source: Wang et al. 2018, "ESRGAN: Enhanced Super-Resolution Generative
Adversarial Networks"; pixel unshuffle as in Wang et al. 2021, "Real-ESRGAN".
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from faithdiff_jax.config import Range, check_ranges
from faithdiff_jax.errors import InputError
from faithdiff_jax.models.layers import Layers, scan_stack
from faithdiff_jax.models.sizes import LARGEST_WIDTH, MOST_LAYERS

SLOPE = 0.2  # of the leaky ReLU below zero
RESIDUAL = 0.2  # what a block adds to its input is scaled by this
DENSE_BLOCKS = 3  # in an RRDB
RGB = 3
REACH = 2  # features on each side that `RRDBNet.enlarge` sees

Features = Float[Array, "b h w c"]
Inside = Float[Array, "b h w 1"]


@dataclasses.dataclass(frozen=True)
class RRDBNetConfig:
    """The sizes of a network; the defaults are those of Real-ESRGAN x4plus, BSRGAN and BSRNet.

    Attributes:
        blocks: RRDB blocks.
        channels: of the features.
        growth: channels that each convolution of a dense block adds.
        unshuffle: side of the squares of pixels that become channels at first: 2 for x2plus.
        doublings: how often the features are made twice as large.
    """

    blocks: int = 23
    channels: int = 64
    growth: int = 32
    unshuffle: int = 1
    doublings: int = 2

    def __post_init__(self) -> None:
        """Refuse sizes that no network has."""
        check_ranges(
            self,
            blocks=Range(1, MOST_LAYERS, whole=True),
            channels=Range(1, LARGEST_WIDTH, whole=True),
            growth=Range(1, LARGEST_WIDTH, whole=True),
            unshuffle=Range(1, 4, whole=True),
            doublings=Range(1, 2, whole=True),
        )
        if self.unshuffle == 3 or self.unshuffle > 2**self.doublings:
            raise InputError(f"unshuffle is {self.unshuffle}: must be 1, 2 or 4, and with 1 doubling at most 2")

    @property
    def scale(self) -> int:
        """How many times larger a picture becomes on each side."""
        return int(2**self.doublings // self.unshuffle)


class DenseBlock(nnx.Module):
    """Five convolutions, each of which sees what all before it made."""

    def __init__(self, channels: int, growth: int, *, make: Layers):
        self.conv1 = make.conv3x3(channels, growth)
        self.conv2 = make.conv3x3(channels + growth, growth)
        self.conv3 = make.conv3x3(channels + 2 * growth, growth)
        self.conv4 = make.conv3x3(channels + 3 * growth, growth)
        self.conv5 = make.conv3x3(channels + 4 * growth, channels)

    def __call__(self, x: Features, inside: Inside | None) -> Features:
        """(B, H, W, channels) -> the same shape."""
        seen = x
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen = jnp.concatenate((seen, _cut(nnx.leaky_relu(conv(seen), SLOPE), inside)), axis=-1)
        return x + RESIDUAL * _cut(self.conv5(seen), inside)


class RRDB(nnx.Module):
    """Residual in residual dense block: three dense blocks and a residual around them."""

    def __init__(self, channels: int, growth: int, *, make: Layers):
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(channels, growth, make=make) for _ in range(DENSE_BLOCKS))

    def __call__(self, x: Features, inside: Inside | None) -> Features:
        """(B, H, W, channels) -> the same shape."""
        hidden = x
        for block in (self.rdb1, self.rdb2, self.rdb3):
            hidden = block(hidden, inside)
        return x + RESIDUAL * hidden


class RRDBNet(nnx.Module):
    """The whole network; `dtype` is what it computes in, `param_dtype` what its parameters are held in."""

    def __init__(
        self,
        config: RRDBNetConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        make = Layers(rngs, dtype=dtype, param_dtype=param_dtype)
        channels = config.channels
        self.unshuffle = config.unshuffle
        self.conv_first = make.conv3x3(RGB * config.unshuffle**2, channels)
        self.body = make.stack(lambda make: RRDB(channels, config.growth, make=make), config.blocks)
        self.conv_body = make.conv3x3(channels, channels)
        self.conv_up1 = make.conv3x3(channels, channels)
        self.conv_up2 = make.conv3x3(channels, channels) if config.doublings == 2 else None
        self.conv_hr = make.conv3x3(channels, channels)
        self.conv_last = make.conv3x3(channels, RGB)

    def __call__(self, pictures: Float[Array, "b h w 3"], inside: Inside | None = None) -> Float[Array, "b H W 3"]:
        """Enlarge pictures: `features`, then `enlarge`.

        Args:
            pictures: (B, h, w, 3) in [0, 1], sides multiples of `unshuffle`.
            inside: (B, h / unshuffle, w / unshuffle, 1), 1 where there is picture, 0 where there is padding, which
                must be 0 in `pictures` too. The picture then comes out as it would alone: its surroundings are the
                zeros that every convolution pads with. None where all is picture.

        Returns:
            (B, h * scale, w * scale, 3), about [0, 1]; of no use in the padding.
        """
        return self.enlarge(self.features(pictures, inside), inside)

    def features(self, pictures: Float[Array, "b H W 3"], inside: Inside | None = None) -> Features:
        """(B, h, w, 3) -> (B, h / unshuffle, w / unshuffle, channels): what is seen of far more than the next pixels.

        A pixel depends on all within 15 times the blocks; on those beyond 64, by less than a level of 255.
        """
        first = _cut(self.conv_first(pixel_unshuffle(pictures, self.unshuffle)), inside)
        hidden = scan_stack(self.body, first, lambda block, hidden, _: block(hidden, inside))
        return first + _cut(self.conv_body(hidden), inside)

    def enlarge(self, features: Features, inside: Inside | None = None) -> Float[Array, "b H W 3"]:
        """(B, H, W, channels) -> (B, H * 2^doublings, W * 2^doublings, 3), each pixel from features within `REACH`."""
        hidden = features
        for conv in (self.conv_up1, self.conv_up2):
            if conv is not None:
                inside = None if inside is None else _twice(inside)
                hidden = _cut(nnx.leaky_relu(conv(_twice(hidden)), SLOPE), inside)
        return self.conv_last(_cut(nnx.leaky_relu(self.conv_hr(hidden), SLOPE), inside))


def pixel_unshuffle(pictures: Float[Array, "b h w c"], side: int) -> Float[Array, "b h2 w2 c2"]:
    """(B, H, W, C) -> (B, H / side, W / side, C * side * side): squares of pixels as channels, in torch's order."""
    if side == 1:
        return pictures
    batch, height, width, channels = pictures.shape
    squares = pictures.reshape(batch, height // side, side, width // side, side, channels)
    return squares.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // side, width // side, channels * side**2)


def _cut(x: Features, inside: Inside | None) -> Features:
    """Zeros outside of the picture."""
    return x if inside is None else x * inside.astype(x.dtype)


def _twice(x: Features) -> Float[Array, "b h2 w2 c"]:
    """Each pixel as four."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
