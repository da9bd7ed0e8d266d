"""LPIPS and DISTS: how alike two pictures look to networks that recognise objects; 0 for equal ones, lower is better.

pictures --AlexNet or VGG16--> activations of both --difference (LPIPS), or means and correlations (DISTS)--> a figure
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from faithdiff_jax.evaluation.metrics.features import Convolution, Features, alexnet, l2_pool, max_pool, vgg16
from faithdiff_jax.evaluation.metrics.pictures import Picture
from faithdiff_jax.evaluation.metrics.weights import backbone, shipped

LPIPS_SHIFT, LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PIXELS_AT_ONCE = {"cpu": 1, "gpu": 16 * 512 * 512, "tpu": 16 * 512 * 512}
"""Of pairs computed together, by backend: a CPU gains nothing from more than one pair."""

Pictures = UInt8[Array, "b h w 3"]
Images = Float[Array, "b h w 3"]
Compare = Callable[[Pictures, Pictures], Float[Array, " b"]]


def lpips(net: str) -> Callable[[Sequence[Picture], Sequence[Picture]], list[float]]:
    """LPIPS 0.1 on "alex" or "vgg": a function of pictures of one size and their references, which computes in batches.

    Raises:
        Unavailable: the weights are not installed.

    Source: Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric", equation 1.
    """
    distance = lpips_distance(net)
    return functools.partial(_in_batches, jax.jit(lambda ours, theirs: distance(_signed(ours), _signed(theirs))))


def lpips_distance(net: str) -> Callable[[Images, Images], Float[Array, " b"]]:
    """LPIPS 0.1 as a differentiable function of pictures (b, H, W, 3) in [-1, 1] and their references.

    Raises:
        Unavailable: the weights are not installed.
    """
    convolutions, heads = jax.tree.map(jnp.asarray, tuple(backbone(net)))
    return functools.partial(_lpips, net, convolutions, heads)


def dists() -> Callable[[Sequence[Picture], Sequence[Picture]], list[float]]:
    """DISTS: a function of pictures of one size and their references, which computes in batches.

    The pictures keep their size, as in pyiqa; the authors' own script first shrinks them to 256 pixels.

    Raises:
        Unavailable: the weights of VGG16 are not installed.

    Source: Ding et al. 2020, "Image quality assessment: unifying structure and texture similarity", equations 4 to 6.
    """
    convolutions = jax.tree.map(jnp.asarray, backbone("vgg").convolutions)
    weights = jax.tree.map(jnp.asarray, shipped("dists"))
    return functools.partial(_in_batches, functools.partial(_dists, convolutions, weights["alpha"], weights["beta"]))


@functools.partial(jax.jit, static_argnums=0)
def _lpips(
    net: str, convolutions: list[Convolution], heads: list[Float[Array, " _"]], restored: Images, reference: Images
) -> Float[Array, " b"]:
    x = _normalised(jnp.concatenate([restored, reference]), LPIPS_SHIFT, LPIPS_SCALE)
    pool = functools.partial(max_pool, side=2)
    features = alexnet(convolutions, x) if net == "alex" else vgg16(convolutions, x, pool)
    distance = jnp.zeros(len(restored))
    for layer, head in zip(features, heads, strict=True):
        squares = jnp.sum(layer * layer, -1, keepdims=True)
        # The root's slope at zero is infinite, and as a loss this would be NaN where no channel is active.
        length = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
        unit = layer / (length + 1e-10)
        ours, theirs = jnp.split(unit, 2)
        distance += jnp.mean(jnp.sum(jnp.square(ours - theirs) * head[None, None, None], -1), (1, 2))
    return distance


@jax.jit
def _dists(
    convolutions: list[Convolution], alpha: Float[Array, " c"], beta: Float[Array, " c"],
    restored: Pictures, reference: Pictures,
) -> Float[Array, " b"]:  # fmt: skip
    x = jnp.concatenate([restored, reference]) / 255.0
    layers: Features = [x, *vgg16(convolutions, _normalised(x, IMAGENET_MEAN, IMAGENET_DEVIATION), l2_pool)]
    # Similarity of texture (means) and of structure (correlation), of every channel of every layer.
    texture, structure = (jnp.concatenate(kind, -1) for kind in zip(*map(_similarities, layers), strict=True))
    total = alpha.sum() + beta.sum()
    return 1 - (texture @ alpha + structure @ beta) / total


def _similarities(layer: Float[Array, "b2 h w c"]) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
    """Of the first half of a batch and the second: by channel means, and by variances and covariance."""
    ours, theirs = jnp.split(layer, 2)
    mean_x, mean_y = ours.mean((1, 2)), theirs.mean((1, 2))
    x, y = ours - mean_x[:, None, None], theirs - mean_y[:, None, None]
    variances, covariance = (x * x + y * y).mean((1, 2)), (x * y).mean((1, 2))
    texture = (2 * mean_x * mean_y + 1e-6) / (mean_x**2 + mean_y**2 + 1e-6)
    return texture, (2 * covariance + 1e-6) / (variances + 1e-6)


def _signed(pictures: Pictures) -> Images:
    """0..255 -> [-1, 1]."""
    return pictures / 127.5 - 1


def _normalised(
    x: Float[Array, "b h w 3"], shift: tuple[float, ...], scale: tuple[float, ...]
) -> Float[Array, "b h w 3"]:
    return (x - jnp.array(shift)[None, None, None]) / jnp.array(scale)[None, None, None]


def _in_batches(compare: Compare, restored: Sequence[Picture], references: Sequence[Picture]) -> list[float]:
    """Compare so many pairs at once that the device is busy; the last batch is filled up to the others' size."""
    height, width = restored[0].shape[:2]
    at_once = max(1, min(len(restored), PIXELS_AT_ONCE.get(jax.default_backend(), 1) // (height * width)))
    figures: list[float] = []
    for begin in range(0, len(restored), at_once):
        chosen = [min(index, len(restored) - 1) for index in range(begin, begin + at_once)]
        ours, theirs = (jnp.stack([pictures[index] for index in chosen]) for pictures in (restored, references))
        figures += np.asarray(compare(ours, theirs)).tolist()
    return figures[: len(restored)]
