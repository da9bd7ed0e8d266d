"""3x3 convolutions by Winograd's minimal filtering (Lavin and Gray 2016), with both gradients.

    picture --tiles--> B^T d B ----\\
                                    (t, t) products of (tiles, C) with (C, O) --> A^T m A --> picture
    kernel ----------> G g G^T ----/

A tile of m x m results takes t x t = (m + 2) x (m + 2) products instead of 9 m x m: 2.25 times fewer for m = 2, 4 times
fewer for m = 4. Arrays are (B, H, W, C), kernels (3, 3, C, O), results as large as the picture.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Picture = Float[Array, "b h w c"]
Kernel = Float[Array, "3 3 i o"]
Padded = Float[Array, "b rows_and_zeros columns_and_zeros c"]
Products = Float[Array, "t t b rows columns c"]
"""One matrix for each place in a tile: its rows are the tiles of all pictures, its columns the channels."""

# Where the polynomials are evaluated, beside infinity. For m = 4 these leave a fourth of the error of 0, +-1, +-2.
POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.75, -0.75, 1.5, -1.5)}

TILES_AT_ONCE = 128
"""A large picture goes through in strips of at least so many tiles, so that a strip's transform stays in the cache."""


@functools.cache
def matrices(m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A^T (m, t), G (t, 3) and B^T (t, t) with A^T [(G g) * (B^T d)] = the m dot products of g with d's windows."""
    points = POINTS[m]
    t = len(points) + 1
    others = [np.poly([q for q in points if q != p])[::-1] for p in points]  # coefficients, lowest power first
    at_point = np.array([math.prod(p - q for q in points if q != p) for p in points])
    powers = np.array([[p**i for p in points] for i in range(max(m, 3))])
    a = np.zeros((m, t))
    a[:, :-1], a[-1, -1] = powers[:m], 1
    g = np.zeros((t, 3))
    g[:-1], g[-1, -1] = powers[:3].T / at_point[:, None], 1
    b = np.zeros((t, t))
    b[:-1, :-1], b[-1] = others, np.poly(points)[::-1]
    return a, g, b


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: Picture, kernel: Kernel, m: int) -> Float[Array, "b h w o"]:
    """(B, H, W, C) with (3, 3, C, O) -> (B, H, W, O), zeros around the picture, by tiles of m x m results (2 or 4)."""
    result: Array = winograd_convolution(x, kernel, m)
    return result


def _forward(x: Picture, kernel: Kernel, m: int) -> tuple[Array, tuple[Array, Array]]:
    return winograd_convolution(x, kernel, m), (x, kernel)


def _backward(m: int, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    return winograd_convolution(gradient, flipped, m), winograd_kernel_gradient(x, gradient, m)


convolve.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=2)
def winograd_convolution(x: Picture, kernel: Kernel, m: int) -> Float[Array, "b h w o"]:
    """`convolve` without its gradients; FLOPs are counted by this name."""
    batch, height, width, _ = x.shape
    rows, at_once, columns = _strips(x, m)
    zero = _zero_of(x)
    x = _fill(x, rows * m + 2, columns * m + 2, before=1)
    weights = kernel_products(kernel, m, zero)

    def strip(x: Array) -> Array:
        return from_products(jnp.einsum("ijbyxc,ijco->ijbyxo", to_products(x, m), weights), m)

    def fill_in(i: Array, result: Array) -> Array:
        first = i * at_once * m
        part = strip(jax.lax.dynamic_slice_in_dim(x, first, at_once * m + 2, axis=1))
        return jax.lax.dynamic_update_slice_in_dim(result, part, first, axis=1)

    if at_once == rows:
        result = strip(x)
    else:
        blank = jnp.full((batch, rows * m, columns * m, kernel.shape[-1]), zero)
        result = jax.lax.fori_loop(0, rows // at_once, fill_in, blank)
    return result[:, :height, :width]


@functools.partial(jax.jit, static_argnums=2)
def winograd_kernel_gradient(x: Picture, gradient: Float[Array, "b h w o"], m: int) -> Kernel:
    """(B, H, W, C) and the gradient of the result (B, H, W, O) -> that of the kernel (3, 3, C, O)."""
    rows, at_once, columns = _strips(x, m)
    x = _fill(x, rows * m + 2, columns * m + 2, before=1)
    gradient = _fill(gradient, rows * m, columns * m, before=0)

    def some(first: Array | int) -> Array:
        ours = jax.lax.dynamic_slice_in_dim(x, first * m, at_once * m + 2, axis=1)
        theirs = jax.lax.dynamic_slice_in_dim(gradient, first * m, at_once * m, axis=1)
        return jnp.einsum("ijbyxc,ijbyxo->ijco", to_products(ours, m), _spread(theirs, m))

    if at_once == rows:
        summed = some(0)
    else:
        zeros = jnp.zeros((m + 2, m + 2, x.shape[-1], gradient.shape[-1]), x.dtype)
        firsts = jnp.arange(0, rows, at_once)
        summed = jax.lax.scan(lambda total, first: (total + some(first), None), zeros, firsts)[0]
    channels = summed.shape[2:]
    return jnp.dot(_kernel_transform(m, summed.dtype).T, summed.reshape(-1, math.prod(channels))).reshape(
        3, 3, *channels
    )


def kernel_products(kernel: Kernel, m: int, zero: Float[Array, ""]) -> Float[Array, "t t i o"]:
    """G g G^T, as one product of a (t * t, 9) matrix to which `_zero_of` the picture is added."""
    transform = _kernel_transform(m, kernel.dtype) + zero
    return jnp.dot(transform, kernel.reshape(9, -1)).reshape(m + 2, m + 2, *kernel.shape[2:])


def _kernel_transform(m: int, dtype: np.dtype) -> np.ndarray:
    g = matrices(m)[1]
    return np.kron(g, g).astype(dtype)


def to_products(x: Padded, m: int) -> Products:
    """(B, rows * m + 2, columns * m + 2, C) -> B^T d B of every tile: first along the picture's columns, then rows."""
    b = matrices(m)[2]
    t, rows, columns = m + 2, (x.shape[1] - 2) // m, (x.shape[2] - 2) // m
    x = _sums(b, [x[:, :, j : j + m * (columns - 1) + 1 : m] for j in range(t)])
    x = _sums(b, [x[:, :, i : i + m * (rows - 1) + 1 : m] for i in range(t)])
    return x


def from_products(products: Products, m: int) -> Picture:
    """A^T m A of every tile, put side by side: (B, rows * m, columns * m, O)."""
    a = matrices(m)[0]
    _, _, batch, rows, columns, channels = products.shape
    x = _sums(a, list(products))
    x = _sums(a, list(x.swapaxes(0, 1)))  # (column in tile, row in tile, B, rows, columns, O)
    return x.transpose(2, 3, 1, 4, 0, 5).reshape(batch, rows * m, columns * m, channels)


def _spread(gradient: Picture, m: int) -> Products:
    """A d A^T of every tile of the result's gradient: what `from_products` does, transposed."""
    a = matrices(m)[0].T
    batch, height, width, channels = gradient.shape
    tiles = gradient.reshape(batch, height // m, m, width // m, m, channels).transpose(4, 2, 0, 1, 3, 5)
    x = _sums(a, list(tiles))
    return _sums(a, list(x.swapaxes(0, 1)))


def _sums(matrix: np.ndarray, parts: Sequence[Array]) -> Array:
    """matrix @ parts, where parts are arrays of one shape: sums without the terms that are zero."""
    dtype = parts[0].dtype.type

    def total(row: np.ndarray) -> Array:
        terms = [
            part if factor == 1 else dtype(factor) * part for factor, part in zip(row, parts, strict=True) if factor
        ]
        return functools.reduce(jnp.add, terms)

    return jnp.stack([total(row) for row in matrix])


def _strips(x: Picture, m: int) -> tuple[int, int, int]:
    """Rows of tiles that cover a picture, in whole strips; rows in a strip; columns of tiles."""
    batch, height, width, _ = x.shape
    rows, columns = math.ceil(height / m), math.ceil(width / m)
    at_once = min(rows, math.ceil(TILES_AT_ONCE / (batch * columns)))
    at_once = math.ceil(rows / math.ceil(rows / at_once))  # strips of equal height, with the least below the picture
    return math.ceil(rows / at_once) * at_once, at_once, columns


def _fill(x: Picture, height: int, width: int, *, before: int) -> Padded:
    """Zeros around a picture, `before` of them above and to the left."""
    below, right = height - x.shape[1] - before, width - x.shape[2] - before
    return jnp.pad(x, ((0, 0), (before, below), (before, right), (0, 0)))


def _zero_of(x: Picture) -> Float[Array, ""]:
    """A zero that is there when the picture is, which the compiler cannot foresee.

    What needs it waits. Made ahead, a whole model's transformed kernels, four times as large as its kernels, and the
    memory of all its results would live at once, or for all steps of a sampler.
    """
    corner = x[0, 0, 0, 0]
    return 0 * jnp.where(jnp.isfinite(corner), corner, 0)
