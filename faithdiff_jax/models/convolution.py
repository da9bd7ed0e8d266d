"""3x3 convolutions: one function, and the choice of the algorithm that computes it.

(pictures, kernel) -> choose by platform, shape and dtype -> Winograd F(4x4) | Winograd F(2x2) | XLA's own
"""

import contextlib
import contextvars
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from faithdiff_jax.models import winograd
from faithdiff_jax.models.backend import platform, setting

TILES = {"winograd4": 4, "winograd2": 2}
ALGORITHMS = (*TILES, "direct")

# What a core of a recent server does in a second: arithmetic of products and convolutions, bytes of transformed
# weights, bytes of transformed pictures. Only their ratios choose; benchmarks/convolutions.py measures the choice.
FLOPS = 200e9
WEIGHT_BYTES = 7e9
PICTURE_BYTES = 8e9
# Below so many channels the transforms, which are not products, would be most of the work.
CHANNELS = 64

LAYOUT = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
"""Pictures (B, H, W, C) and kernels (H, W, I, O)."""

_algorithm: contextvars.ContextVar[str | None] = contextvars.ContextVar("algorithm", default=None)


def convolve(
    inputs: Float[Array, "b h w i"],
    kernel: Float[Array, "kh kw i o"],
    strides: tuple[int, ...],
    padding: Any,
    **others: Any,
) -> Float[Array, "b oh ow o"]:
    """`jax.lax.conv_general_dilated` for `nnx.Conv`, by Winograd where that is faster.

    Args:
        inputs: (B, H, W, C).
        kernel: (3, 3, C, O) of the same dtype, or of another size.
        strides: of rows and columns.
        padding: ((top, bottom), (left, right)), or what else `conv_general_dilated` takes.
        others: what `nnx.Conv` hands on beside these; Winograd is for convolutions that leave all of it at its default.
            It takes any `precision`, for a CPU has only one.
    """
    others.setdefault("dimension_numbers", LAYOUT)
    plain = tuple(strides) == (1, 1) and padding in ([(1, 1), (1, 1)], ((1, 1), (1, 1)))
    if plain and kernel.shape[:2] == (3, 3) and all(_is_default(name, value) for name, value in others.items()):
        algorithm = _algorithm.get() or choose(platform(), inputs.shape, kernel.shape[-1], inputs.dtype)
        if algorithm != "direct":
            return winograd.convolve(inputs, kernel, TILES[algorithm])
    result: Array = jax.lax.conv_general_dilated(inputs, kernel, strides, padding, **others)
    return result


def choose(platform: str, shape: tuple[int, ...], outputs: int, dtype: DTypeLike) -> str:
    """Name the algorithm for pictures (B, H, W, C) and so many output channels: one of `ALGORITHMS`.

    Winograd is for float32 on CPU: 16-bit floats would lose digits in its transforms, and accelerators have matrix
    units whose convolutions are as fast as their products. There it is what costs the least by the rates above: large
    tiles for large pictures, small ones where the transformed weights would cost more than the arithmetic saved.
    """
    if platform != "cpu" or jnp.dtype(dtype) != jnp.float32 or min(shape[-1], outputs) < CHANNELS:
        return "direct"
    return min(ALGORITHMS, key=lambda algorithm: seconds(algorithm, shape, outputs))


def seconds(algorithm: str, shape: tuple[int, ...], outputs: int) -> float:
    """What pictures (B, H, W, C) to so many channels cost on one core, by the rates above."""
    batch, height, width, inputs = shape
    if algorithm == "direct":
        return 2 * 9 * batch * height * width * inputs * outputs / FLOPS
    m = TILES[algorithm]
    places = (m + 2) ** 2
    tiles = batch * math.ceil(height / m) * math.ceil(width / m)
    products = 2 * places * tiles * inputs * outputs / FLOPS
    size = 4 * places
    return products + size * inputs * outputs / WEIGHT_BYTES + size * tiles * (inputs + outputs) / PICTURE_BYTES


def use_algorithm(name: str) -> contextlib.AbstractContextManager[None]:
    """Force one algorithm for everything traced inside, to compare or to debug."""
    if name not in ALGORITHMS:
        raise ValueError(f"convolution algorithm {name!r}: must be one of {', '.join(ALGORITHMS)}")
    return setting(_algorithm, name)


def _is_default(name: str, value: Any) -> bool:
    """Whether an argument of `nnx.Conv` is what it is for a plain convolution."""
    if name == "dimension_numbers":
        return bool(value == LAYOUT)
    return name == "precision" or value in (None, 1, (1, 1))
