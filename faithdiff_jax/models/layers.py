"""Parts that several models share: stacks of equal blocks, rematerialisation, QuickGELU."""

import contextlib
import contextvars
import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from flax import nnx

Block = TypeVar("Block", bound=nnx.Module)
Carry = TypeVar("Carry")

# What of a block's inside is kept from the forward for the backward pass; its inputs always are.
POLICIES: dict[str, Callable[..., Any]] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

_policy: contextvars.ContextVar[str] = contextvars.ContextVar("rematerialisation", default="none")


def rematerialise(policy: str) -> contextlib.AbstractContextManager[None]:
    """Choose what every block traced inside keeps for its gradient, and what it computes again (Chen et al. 2016).

    "none" keeps every activation (as outside); "full" keeps the blocks' inputs only, at the price of a second
    forward pass; "dots" keeps the results of linear layers as well, and computes convolutions and norms again, and
    attention where it is not a loop (as it is on CPU). Values do not change. A program that is compiled already
    stays as it was traced. On CPU memory is saved in stacks alone: XLA merges there what is computed twice elsewhere.

    Raises:
        ValueError: another policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"rematerialisation is {policy!r}: must be one of {', '.join(POLICIES)}")
    return _set_policy(policy)


@contextlib.contextmanager
def _set_policy(policy: str) -> Iterator[None]:
    token = _policy.set(policy)
    try:
        yield
    finally:
        _policy.reset(token)


def run_block(block: Block, *arrays: Any, call: Callable[..., Any] = operator.call) -> Any:
    """`block(*arrays)`, rematerialised as `rematerialise` says; `arrays` are pytrees of arrays.

    `call(block, *arrays)` runs something else than the block's `__call__`, or binds arguments that are no arrays.
    """
    if _policy.get() == "none":
        return call(block, *arrays)
    graph, parameters = nnx.split(block)
    run = jax.checkpoint(
        lambda parameters, *arrays: call(nnx.merge(graph, parameters), *arrays), policy=POLICIES[_policy.get()]
    )
    return run(parameters, *arrays)


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
    Each layer is a block to `rematerialise`.
    """
    graph, layers = nnx.split(stacked)

    def step(carry, layer):
        parameters, x = layer
        return fn(nnx.merge(graph, parameters), carry, x), None

    if _policy.get() != "none":
        # The two passes are loops of their own, between which the compiler cannot merge what is computed twice.
        step = jax.checkpoint(step, policy=POLICIES[_policy.get()], prevent_cse=False)
    return jax.lax.scan(step, carry, (layers, xs))[0]


def quick_gelu(values: jax.Array) -> jax.Array:
    """Approximate GELU as OpenAI's CLIP does: `x * sigmoid(1.702 x)`."""
    return values * jax.nn.sigmoid(1.702 * values)
