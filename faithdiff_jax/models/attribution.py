"""Which pixels look at which words of the text: DAAM (Tang et al. 2023, "What the DAAM", section 2.2).

    each head of a transformer: softmax(q k^T / sqrt(dim)) --tokens of a word--> the word's share of a pixel's attention
    sum over heads and blocks (one map for each transformer) --bicubic--> latent resolution --mean--> map of the word

As in the paper and its code (`daam` 0.2.0), the cross-attention on the way down and up counts, that in the middle does
not; of the two sides of the guidance the caption's counts; the tokens of a word are averaged. Where they differ: maps
are summed before they are enlarged, which is the same since enlarging is linear, so no map of a single head is
kept; negative values of the interpolation are cut off once, by whoever shows a map, where the code does it for
every head of every layer; maps have the size of the latents, where the code takes 64 or 96 pixels a side; and they are
means, also over steps, where the code sums over steps: a value is the part of a pixel's attention, 0 to 1.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from faithdiff_jax.errors import InputError

Words = Float[Array, "texts m words"]
"""(n, M, W), the weight of each text token in each word, for n texts; see `files.tokenizers.Tokenizers.positions`."""
Shares = Float32[Array, "texts pixels words"]
"""(n, N, W), the part of each pixel's attention that goes to each word."""
Maps = Float32[Array, "texts h w words"]
"""(n, h, w, W), `Shares` where their pixels are."""

CUBIC = -0.75
"""The bicubic kernel's slope at 1, as in PyTorch and OpenCV; Keys (1981) has -0.5."""


def shares(
    queries: Float[Array, "texts pixels heads d"], keys: Float[Array, "texts m heads d"], words: Words
) -> Float32[Array, "texts pixels words"]:
    """The part of each pixel's attention that goes to each word, summed over heads; the softmax is in float32.

    Args:
        queries: (n, N, heads, dim).
        keys: (n, M, heads, dim), of the text.
        words: (n, M, W).

    Returns:
        (n, N, W).
    """
    scores = jnp.einsum("nphd,nmhd->nhpm", queries, keys, preferred_element_type=jnp.float32)
    attention = jax.nn.softmax(scores / math.sqrt(queries.shape[-1]))
    return jnp.einsum("nhpm,nmw->npw", attention, words)


def mean_map(sums: Sequence[Float32[Array, "texts _h _w words"]], heads: int, size: tuple[int, int]) -> Maps:
    """Sums of maps, of any sizes, brought to one size, as the mean over the heads that went into them.

    Args:
        sums: (n, h, w, W) each, of one transformer.
        heads: how many they are sums over, all together.
        size: height and width of the result.

    Returns:
        (n, *size, W).

    Raises:
        InputError: no sums, of a UNet whose transformers are all in the middle.
    """
    if not sums:
        raise InputError("this model attends to the text in the middle of its UNet only, which attribution leaves out")
    by_size: dict[tuple[int, ...], Array] = {}
    for maps in sums:
        by_size[maps.shape] = by_size[maps.shape] + maps if maps.shape in by_size else maps
    enlarged = [
        jnp.einsum("yh,nhwk,xw->nyxk", bicubic(maps.shape[1], size[0]), maps, bicubic(maps.shape[2], size[1]))
        for maps in by_size.values()
    ]
    return sum(enlarged[1:], start=enlarged[0]) / heads


def bicubic(old: int, new: int) -> Float32[np.ndarray, "{new} {old}"]:
    """The matrix that interpolates `old` samples at `new` places: pixel centres aligned, the border repeated."""
    places = (np.arange(new) + 0.5) * old / new - 0.5
    whole = np.floor(places).astype(int)
    matrix = np.zeros((new, old))
    for tap in (-1, 0, 1, 2):
        np.add.at(matrix, (np.arange(new), (whole + tap).clip(0, old - 1)), _kernel(places - whole - tap))
    return matrix.astype(np.float32)


def _kernel(x: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel at distances below 2."""
    x = np.abs(x)
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x**2 + 1
    far = CUBIC * (((x - 5) * x + 8) * x - 4)
    kernel: np.ndarray = np.where(x <= 1, near, far)
    return kernel
