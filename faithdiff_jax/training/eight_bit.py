"""Adam with both moments in 8 bits (Dettmers et al. 2022): an optax transformation, and what it keeps.

    moment, float32 --root, relative to its block's largest--> levels, rounded at random, and one scale a block

In equal steps, the small values of a block would be lost, and with them the direction of the parameters that have small
gradients. Roots in equal steps (the third of the first moment, the sixth of the second) hold values down to half a
millionth of the largest, and to less than a millionth of a millionth. Rounding is at random, and so right on average:
the second moment changes by a thousandth in a step, and rounded to the nearest level it would not change at all.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int, UInt32

from faithdiff_jax.sharding import parameter_sharding

BLOCK = 64
"""Values that share a scale."""

SMALLEST = 4096
"""Arrays of fewer values stay in float32: they are norms and biases."""


class EightBit(NamedTuple):
    """An array in 8 bits: int8 of either sign, to the third power; or uint8 of none, to the sixth.

    Attributes:
        levels: of the array's shape.
        scales: the largest magnitude of each block; the same shape, but for one axis, which is that of the blocks.
    """

    levels: Int[Array, "..."]
    scales: Float32[Array, "..."]

    def sharding(self, mesh: Mesh) -> Any:
        """Where both lie: as a float32 array of that shape would, the scales beside their levels."""
        place = parameter_sharding(mesh, self.levels.shape)
        sides = [1 if name is None else mesh.shape[name] for name in place.spec]
        divide = all(length % side == 0 for length, side in zip(self.scales.shape, sides, strict=False))
        return type(self)(place, place if divide else NamedSharding(mesh, PartitionSpec()))  # type: ignore[arg-type]


Moment = EightBit | Float32[Array, "..."]


def block_axis(shape: tuple[int, ...]) -> int | None:
    """The axis that blocks lie along, None for an array that stays in float32.

    Of the axes that blocks divide it is the shortest, as meshes split the longest: blocks are not torn apart then. It
    does not depend on the mesh, so that a run may change that.
    """
    axes = [axis for axis, length in enumerate(shape) if length % BLOCK == 0]
    if math.prod(shape) < SMALLEST or not axes:
        return None
    return min(reversed(axes), key=lambda axis: shape[axis])


def to_8_bits(array: Float32[Array, "*shape"], noise: UInt32[Array, "*shape"], *, signed: bool) -> Moment:
    """An array in 8 bits, or as it is if it has no blocks.

    Args:
        array: not negative without `signed`; what is not zero does not become zero then, as it is divided by.
        noise: even over 0 to 65,535: says whether a value between two levels becomes the higher or the lower one.
        signed: whether there are values below zero.
    """
    axis = block_axis(array.shape)
    if axis is None:
        return array
    power, most = _levels(signed)
    scales = jnp.max(_blocks(jnp.abs(array), axis), axis + 1, keepdims=True)
    relative = (_blocks(jnp.abs(array), axis) / jnp.where(scales > 0, scales, 1)).reshape(array.shape)
    root = most * jnp.cbrt(relative if power == 3 else jnp.sqrt(relative))
    low = jnp.floor(root)
    part = (root**power - low**power) / ((low + 1) ** power - low**power)
    levels = jnp.minimum(low + (noise < part * 2**16), most)
    levels = jnp.sign(array) * (levels if signed else jnp.maximum(levels, 1))
    return EightBit(levels.astype(jnp.int8 if signed else jnp.uint8), jnp.squeeze(scales, axis + 1))


def from_8_bits(moment: Moment) -> Float32[Array, "..."]:
    """The float32 array that `to_8_bits` was given, nearly."""
    if not isinstance(moment, EightBit):
        return moment
    axis = block_axis(moment.levels.shape)
    assert axis is not None
    power, most = _levels(moment.levels.dtype == jnp.int8)
    relative = (moment.levels.astype(jnp.float32) / most) ** power
    return (_blocks(relative, axis) * jnp.expand_dims(moment.scales, axis + 1)).reshape(moment.levels.shape)


def scale_by_adam_in_8_bits(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """As `optax.scale_by_adam`, with moments of 8 bits between the steps; what a step computes with is float32."""

    def zeros(leaf: jax.Array, signed: bool) -> Moment:
        return to_8_bits(jnp.zeros(leaf.shape), jnp.zeros(leaf.shape, jnp.uint32), signed=signed)

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        first, second = (jax.tree.map(lambda leaf, sign=sign: zeros(leaf, sign), params) for sign in (True, False))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), first, second)

    def update(
        gradients: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        assert isinstance(state, optax.ScaleByAdamState)
        count = optax.safe_increment(state.count)

        def one(number: int, gradient: jax.Array, first: Moment, second: Moment) -> tuple[jax.Array, Moment, Moment]:
            mu = b1 * from_8_bits(first) + (1 - b1) * gradient
            nu = b2 * from_8_bits(second) + (1 - b2) * gradient**2
            change = mu / (1 - b1**count) / (jnp.sqrt(nu / (1 - b2**count)) + eps)
            noise = random_bits(gradient.shape, count, number)
            return change, to_8_bits(mu, noise & 0xFFFF, signed=True), to_8_bits(nu, noise >> 16, signed=False)

        leaves, structure = jax.tree.flatten(gradients)
        moments = [jax.tree.leaves(tree, is_leaf=is_eight_bit) for tree in (state.mu, state.nu)]
        done = map(one, range(len(leaves)), leaves, *moments)
        changes, mu, nu = (jax.tree.unflatten(structure, column) for column in zip(*done, strict=True))
        return changes, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def is_eight_bit(leaf: Any) -> bool:
    """For `jax.tree`, to take both parts of an array in 8 bits as one leaf."""
    return isinstance(leaf, EightBit)


def random_bits(shape: tuple[int, ...], step: Int[Array, ""], number: int) -> UInt32[Array, "*shape"]:
    """32 bits for each element of the array of a number at a step: its place, hashed (lowbias32, Wellons 2018).

    Devices need nothing of one another for it, and it takes a few operations; JAX's generators take a hundred.
    """
    place = jnp.zeros(shape, jnp.uint32)
    for axis, length in enumerate(shape):
        place = place * length + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _hashed(place ^ _hashed(_hashed(step.astype(jnp.uint32)) + jnp.uint32(number)))


def _hashed(bits: jax.Array) -> jax.Array:
    bits = (bits ^ bits >> 16) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ bits >> 15) * jnp.uint32(0x846CA68B)
    return bits ^ bits >> 16


def _blocks(array: jax.Array, axis: int) -> jax.Array:
    """(..., length, ...) -> (..., length / BLOCK, BLOCK, ...)."""
    return array.reshape(*array.shape[:axis], -1, BLOCK, *array.shape[axis + 1 :])


def _levels(signed: bool) -> tuple[int, int]:
    """The power that levels are taken to, and the level of a block's largest value."""
    return (3, 127) if signed else (6, 255)
