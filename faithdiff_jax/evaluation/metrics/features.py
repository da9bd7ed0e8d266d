"""What AlexNet and VGG16 see in a picture: the activations that LPIPS and DISTS compare. All are (B, H, W, C)."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from faithdiff_jax.models.convolution import convolve

Convolution = tuple[Float[Array, "_ _ _ _"], Float[Array, " _"]]
"""A kernel (height, width, in, out) and a bias (out,)."""
Features = list[Float[Array, "b _ _ _"]]
Pool = Callable[[Float[Array, "b h w c"]], Float[Array, "b h2 w2 c"]]

# Convolutions of VGG16 before each pooling and at the end, the last of whose activations are taken.
VGG_STAGES = (2, 2, 3, 3, 3)


def alexnet(convolutions: Sequence[Convolution], x: Float[Array, "b h w 3"]) -> Features:
    """The activations after each of the five convolutions.

    Source: Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks", as in torchvision.
    """
    first, second, *rest = convolutions
    features = [_convolved(x, first, stride=4, padding=2)]
    features.append(_convolved(max_pool(features[-1], 3), second, padding=2))
    hidden = max_pool(features[-1], 3)
    for convolution in rest:
        hidden = _convolved(hidden, convolution, padding=1)
        features.append(hidden)
    return features


def vgg16(convolutions: Sequence[Convolution], x: Float[Array, "b h w 3"], pool: Pool) -> Features:
    """The activations at the end of each of the five stages, relu1_2 to relu5_3; `pool` goes between the stages.

    Source: Simonyan and Zisserman 2015, "Very deep convolutional networks for large-scale image recognition".
    """
    features: Features = []
    remaining = list(convolutions)
    for length in VGG_STAGES:
        hidden = pool(features[-1]) if features else x
        for _ in range(length):
            hidden = _convolved(hidden, remaining.pop(0), padding=1)
        features.append(hidden)
    return features


def max_pool(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b h2 w2 c"]:
    """The largest of `side` x `side` at every second place, whole windows only."""
    height, width = ((length - side) // 2 + 1 for length in x.shape[1:3])
    across = _largest([x[:, :, i : i + 2 * width - 1 : 2] for i in range(side)])
    return _largest([across[:, i : i + 2 * height - 1 : 2] for i in range(side)])


def l2_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The root of the squares' mean over 3x3, weighted 1 2 1 along each side, at every second place.

    Source: Ding et al. 2020, "Image quality assessment: unifying structure and texture similarity", equation 3
    and the authors' window.
    """
    squares = jnp.pad(x * x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = ((length - 1) // 2 + 1 for length in x.shape[1:3])
    across = _weighted([squares[:, :, i : i + 2 * width - 1 : 2] for i in range(3)])
    return jnp.sqrt(_weighted([across[:, i : i + 2 * height - 1 : 2] for i in range(3)]) + 1e-12)


def _largest(arrays: Sequence[jax.Array]) -> jax.Array:
    largest = arrays[0]
    for array in arrays[1:]:
        largest = jnp.maximum(largest, array)
    return largest


def _weighted(three: Sequence[jax.Array]) -> jax.Array:
    return 0.25 * three[0] + 0.5 * three[1] + 0.25 * three[2]


def _convolved(x: jax.Array, convolution: Convolution, *, padding: int, stride: int = 1) -> jax.Array:
    """Convolution, bias, ReLU, in full float32 on every device."""
    kernel, bias = convolution
    sides = ((padding, padding), (padding, padding))
    y = convolve(x, kernel, (stride, stride), sides, precision=jax.lax.Precision.HIGHEST)
    return jax.nn.relu(y + bias[None, None, None])
