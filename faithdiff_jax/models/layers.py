"""Parts that several models share."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

Block = TypeVar("Block", bound=nnx.Module)
Carry = TypeVar("Carry")


def stack(make_block: Callable[[nnx.Rngs], Block], depth: int, rngs: nnx.Rngs) -> Block:
    """Make `depth` equal blocks as one module whose every parameter has a leading axis of `depth`.

    `make_block(rngs)` builds one block; each layer is initialised from its own key. The result is not called itself:
    `scan_stack` runs it. A depth below one raises ValueError.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}, a stack needs at least 1")

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make_layers(layer_rngs):
        return make_block(layer_rngs)

    return make_layers(rngs)


def scan_stack(stacked: Block, carry: Carry, fn: Callable[[Block, Carry, Any], Carry], xs: Any = None) -> Carry:
    """Run the layers of a stacked module in order: `carry = fn(block, carry, x)` for each, and the last carry.

    `carry` is any pytree whose shapes and dtypes `fn` keeps. `xs` is a pytree with a leading axis of the depth, one
    slice of which reaches each layer as `x`; without it `x` is None. One layer is compiled, whatever the depth.
    """
    graph, layers = nnx.split(stacked)

    def step(carry, layer):
        parameters, x = layer
        return fn(nnx.merge(graph, parameters), carry, x), None

    return jax.lax.scan(step, carry, (layers, xs))[0]


def quick_gelu(values: jax.Array) -> jax.Array:
    """Approximate GELU as OpenAI's CLIP does: `x * sigmoid(1.702 x)`."""
    return values * jax.nn.sigmoid(1.702 * values)
