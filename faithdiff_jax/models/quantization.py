"""Weights in 8 bits: kernels held as int8 or fp8 with a scale per output channel, and computed with in 16 or 32 bits.

    kernel (..., in, out) --quantize--> Quantized(values, scale) --[...], in a layer--> kernel, rounded

A layer asks for its kernel where it uses it, inside the loop over a stack's layers: of the whole model in 16 bits there
is never more than one layer at a time. No layer knows of it.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from faithdiff_jax.errors import InputError, shown

FORMATS = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
"""fp8 is e4m3, without infinities: 3 bits of mantissa, and a range that int8 has not."""
LARGEST = {"int8": 127.0, "fp8": 448.0}
"""What the largest number of a channel becomes."""
FEWEST = 2**14
"""Numbers of a kernel that is worth it: the first and the last convolution stay as they are."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A kernel in 8 bits; `[...]` gives it as the layers take it.

    Attributes:
        values: (..., in, out) of one of `FORMATS`.
        scale: (..., 1, out): what a channel's values are multiplied by, in the dtype of what comes out.
    """

    values: Any
    scale: Any

    def __getitem__(self, index: Any) -> Array:
        """The kernel, or a part of it, in the scale's dtype."""
        kernel: Array = (self.values.astype(self.scale.dtype) * self.scale)[index]
        return kernel

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's."""
        shape: tuple[int, ...] = self.values.shape
        return shape

    @property
    def dtype(self) -> Any:
        """What the kernel comes out in."""
        return self.scale.dtype


def check_format(form: str) -> None:
    """InputError unless it is one of `FORMATS`."""
    if form not in FORMATS:
        raise InputError(f"quantized {shown(form)}: must be {' or '.join(FORMATS)}")


@functools.partial(jax.jit, static_argnames="form")
def quantize(kernel: Float[Array, "*i o"], form: str) -> Quantized:
    """Round a kernel to 8 bits, each output channel (of each layer of a stack) by its own largest number.

    Args:
        kernel: (in, out) or (kh, kw, in, out), with a leading axis for stacked layers; on a mesh it stays spread.
        form: one of `FORMATS`.
    """
    dtype = FORMATS[form]
    most = LARGEST[form]
    exact = kernel.astype(jnp.float32)
    # The scale is rounded first, so that values are rounded to what they will be multiplied by.
    largest = jnp.max(jnp.abs(exact), axis=summed_axes(kernel.shape), keepdims=True)
    scale = jnp.where(largest > 0, largest / most, 1).astype(kernel.dtype)
    values = exact / scale.astype(jnp.float32)
    if form == "int8":
        values = jnp.round(values)
    return Quantized(jnp.clip(values, -most, most).astype(dtype), scale)


def quantized_shape(shape: tuple[int, ...], form: str, dtype: DTypeLike, shaped: Any) -> Quantized:
    """What `quantize` gives, of shapes alone: each array made by `shaped(shape, dtype)`."""
    axes = summed_axes(shape)
    scale = tuple(1 if axis in axes else side for axis, side in enumerate(shape))
    return Quantized(shaped(shape, FORMATS[form]), shaped(scale, dtype))


def is_quantized(part: str, path: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter goes into 8 bits: large kernels of UNet and text encoders.

    LQ encoder and aligner, which see the picture first, stay as they are, as in the published script; so does the VAE.
    """
    return part.startswith(("unet", "text_encoder")) and path.endswith(".kernel") and math.prod(shape) >= FEWEST


def summed_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a kernel that one scale is for: all but the outputs', and the layers' of a stack (an odd number)."""
    return tuple(range(len(shape) % 2, len(shape) - 1))
