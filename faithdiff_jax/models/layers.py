"""What several models share: the layers they are made of, stacks of equal blocks, rematerialisation, QuickGELU."""

import contextlib
import contextvars
import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from faithdiff_jax.models.backend import setting
from faithdiff_jax.models.convolution import convolve
from faithdiff_jax.models.norms import GroupNorm

Block = TypeVar("Block", bound=nnx.Module)
Carry = TypeVar("Carry")
Result = TypeVar("Result")
Padding = int | tuple[tuple[int, int], tuple[int, int]]
"""Zeros around an image: on every side, or (top, bottom) and (left, right)."""

BLOCK_INPUT = "block_input"

STACK = "blocks"
"""The name that a model gives a stack whose layers may be apart."""
APART_BYTES = 2**20
"""Below so many a parameter is copied faster than it is handed over by itself."""

# What of a block's inside is kept from the forward for the backward pass; its inputs always are.
POLICIES: dict[str, Callable[..., Any]] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@dataclasses.dataclass(frozen=True)
class Layers:
    """Makes the layers of a model, with what they share: the random keys, the compute type, the parameters' type.

    `dtype` None computes in the type of parameters and inputs. Norms take their statistics in float32, with an exact
    (two-pass) variance. Arrays of convolutions are (B, H, W, C).
    """

    rngs: nnx.Rngs
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def linear(self, inputs: int, outputs: int, *, use_bias: bool = True, zeros: bool = False) -> nnx.Linear:
        """A linear layer; with `zeros` its kernel starts at zero."""
        return nnx.Linear(
            inputs, outputs, use_bias=use_bias, kernel_init=_kernel_init(zeros), rngs=self.rngs, **self._types
        )

    def conv1x1(self, inputs: int, outputs: int, *, zeros: bool = False) -> nnx.Conv:
        """A linear layer for each pixel; with `zeros` its kernel starts at zero."""
        return nnx.Conv(inputs, outputs, (1, 1), kernel_init=_kernel_init(zeros), rngs=self.rngs, **self._types)

    def conv3x3(
        self, inputs: int, outputs: int, *, stride: int = 1, padding: Padding = 1, zeros: bool = False
    ) -> nnx.Conv:
        """A 3x3 convolution; it keeps the size unless told otherwise. With `zeros` its kernel starts at zero."""
        return nnx.Conv(
            inputs,
            outputs,
            (3, 3),
            strides=stride,
            padding=padding,
            kernel_init=_kernel_init(zeros),
            conv_general_dilated=convolve,
            rngs=self.rngs,
            **self._types,
        )

    def group_norm(self, channels: int, groups: int, *, epsilon: float) -> GroupNorm:
        """Group normalisation."""
        return GroupNorm(
            channels, num_groups=groups, epsilon=epsilon, use_fast_variance=False, rngs=self.rngs, **self._types
        )

    def layer_norm(self, width: int, *, epsilon: float) -> nnx.LayerNorm:
        """Layer normalisation."""
        return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=self.rngs, **self._types)

    def embedding(self, entries: int, width: int) -> nnx.Embed:
        """A table of vectors."""
        return nnx.Embed(entries, width, rngs=self.rngs, **self._types)

    def stack(self, make_block: Callable[["Layers"], Block], depth: int) -> Block:
        """`stack` of blocks whose layers are made like these, each block from keys of its own."""
        return stack(lambda rngs: make_block(dataclasses.replace(self, rngs=rngs)), depth, self.rngs)

    @property
    def _types(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


def _kernel_init(zeros: bool) -> nnx.Initializer:
    return nnx.initializers.zeros_init() if zeros else nnx.initializers.lecun_normal()


_policy: contextvars.ContextVar[str] = contextvars.ContextVar("rematerialisation", default="none")


def rematerialise(policy: str) -> contextlib.AbstractContextManager[None]:
    """Choose what every block traced inside keeps for its gradient, and what it computes again (Chen et al. 2016).

    "none" keeps every activation (as outside); "full" keeps the blocks' inputs only, at the price of a second
    forward pass; "dots" keeps the results of linear layers as well, and recomputes convolutions and norms, and
    attention where it is not a loop (as it is on CPU); "offload" is "full" with the blocks' inputs in the host's
    memory until they are needed, at the price of moving them there and back. Values do not change, nor does a program
    that is compiled already. On CPU, memory is saved in stacks only: elsewhere XLA merges what would be computed twice.

    Raises:
        ValueError: another policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"rematerialisation is {policy!r}: must be one of {', '.join(POLICIES)}")
    return setting(_policy, policy)


def run_block(block: Block, *arrays: Any, call: Callable[..., Array] = operator.call) -> Array:
    """`block(*arrays)`, rematerialised as `rematerialise` says; `arrays` are pytrees of arrays.

    `call(block, *arrays)` runs something other than the block's `__call__`, or binds arguments that are not arrays.
    """
    if _policy.get() == "none":
        return call(block, *arrays)
    graph, parameters = nnx.split(block)

    def run(parameters: Any, *arrays: Any) -> Array:
        return call(nnx.merge(graph, parameters), *checkpoint_name(arrays, BLOCK_INPUT))

    result: Array = jax.checkpoint(run, policy=POLICIES[_policy.get()])(parameters, *arrays)
    return result


def stack(make_block: Callable[[nnx.Rngs], Block], depth: int, rngs: nnx.Rngs) -> Block:
    """Make `depth` equal blocks as one module whose every parameter has a leading axis of `depth`.

    `make_block(rngs)` builds one block; each layer is initialised from its own key. The result is not called itself:
    `scan_stack` runs it.

    Raises:
        ValueError: a depth below one.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}, a stack needs at least 1")

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make_layers(layer_rngs: nnx.Rngs) -> Block:
        return make_block(layer_rngs)

    stacked: Block = make_layers(rngs)
    return stacked


def scan_stack(stacked: Block, carry: Carry, fn: Callable[[Block, Carry, Any], Carry], xs: Any = None) -> Carry:
    """Run the layers of a stacked module in order: `carry = fn(block, carry, x)` for each, and the last carry.

    `carry` is any pytree whose shapes and dtypes `fn` keeps. `xs` is a pytree with a leading axis of the depth, one
    slice of which reaches each layer as `x`; without it `x` is None. One layer is compiled, whatever the depth; of
    layers that are `Apart`, each is. Each layer is a block to `rematerialise`.
    """
    graph, layers = nnx.split(stacked)

    def step(carry: Carry, layer: tuple[Any, Any]) -> tuple[Carry, None]:
        parameters, x = layer
        return fn(nnx.merge(graph, parameters), checkpoint_name(carry, BLOCK_INPUT), x), None

    if _policy.get() != "none":
        # The two passes are loops of their own, between which the compiler cannot merge what is computed twice.
        step = jax.checkpoint(step, policy=POLICIES[_policy.get()], prevent_cse=False)
    depth = _depth_apart(layers)
    if not depth:
        return jax.lax.scan(step, carry, (layers, xs))[0]
    for number in range(depth):
        carry, _ = step(carry, _layer((layers, xs), number))
    return carry


def map_stack(stacked: Block, fn: Callable[[Block], Result]) -> Result:
    """`fn(block)` of every layer of a stacked module: a pytree of arrays, with a leading axis of the depth."""
    graph, layers = nnx.split(stacked)
    if depth := _depth_apart(layers):
        each = [fn(nnx.merge(graph, _layer(layers, number))) for number in range(depth)]
        together: Result = jax.tree.map(lambda *arrays: jnp.stack(arrays), *each)
        return together
    mapped: Result = jax.lax.map(lambda layer: fn(nnx.merge(graph, layer)), layers)
    return mapped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart:
    """A parameter of a stack as one array for each layer, in the place of one array of all."""

    layers: tuple[Any, ...]


def layers_apart(params: Any, least: int = APART_BYTES) -> Any:
    """Parameters of a part, or of several, with those of stacks as arrays of their own, one a layer: `Apart`.

    A loop over a stack copies each layer's parameters out of the array of all before it computes with them, which takes
    a CPU a tenth to a sixth of the time of a stack of SDXL's. Run with these instead, a stack is no loop, and compiles
    for longer. On a CPU the new arrays share the memory of the old.

    Args:
        params: nested dictionaries, and lists of them, of arrays or of their shapes.
        least: bytes of a layer's parameter, from which on it is taken apart.
    """
    if isinstance(params, list):
        return [layers_apart(part, least) for part in params]
    if not isinstance(params, dict):
        return params
    taken = {}
    for name, part in params.items():
        whole = not _is_stack(name, part)
        taken[name] = layers_apart(part, least) if whole else jax.tree.map(lambda leaf: _apart(leaf, least), part)
    return taken


def _is_stack(name: Any, part: Any) -> bool:
    """Whether parameters are of what `stack` made. A list of blocks has numbers for names."""
    return name == STACK and not any(isinstance(key, int) for key in part)


def _apart(leaf: Any, least: int) -> Any:
    size = math.prod(leaf.shape[1:]) * leaf.dtype.itemsize
    if size < least:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return Apart((jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype),) * leaf.shape[0])
    return Apart(tuple(jax.device_put(layer, may_alias=True) for layer in np.asarray(leaf)))


def _depth_apart(layers: Any) -> int:
    """How many layers a stack has whose parameters are apart; 0 where none is."""
    return max((len(leaf.layers) for leaf in _leaves(layers) if isinstance(leaf, Apart)), default=0)


def _layer(layers: Any, number: int) -> Any:
    def one(leaf: Any) -> Any:
        return leaf.layers[number] if isinstance(leaf, Apart) else leaf[number]

    return jax.tree.map(one, layers, is_leaf=lambda leaf: isinstance(leaf, Apart))


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Apart))


def quick_gelu(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Approximate GELU as OpenAI's CLIP does: `x * sigmoid(1.702 x)`."""
    return values * jax.nn.sigmoid(1.702 * values)
