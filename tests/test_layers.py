"""Stacks of layers: the scan is the layers one by one, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import assert_parity
from port import normal

from faithdiff_jax.models.layers import quick_gelu, scan_stack, stack

DEPTH, DIM = 3, 5


class Block(nnx.Module):
    """A residual layer; `scale` comes from outside."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(dim, dim, rngs=rngs)

    def __call__(self, x, scale=1.0):
        return x + scale * jnp.tanh(self.linear(x))


def make_stack() -> Block:
    return stack(lambda rngs: Block(DIM, rngs=rngs), DEPTH, nnx.Rngs(0))


def layers(stacked: Block) -> list[Block]:
    """The blocks of a stack, apart."""
    graph, state = nnx.split(stacked)
    return [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(DEPTH)]


def through_scan(params, graph, x, scales):
    return scan_stack(nnx.merge(graph, params), x, lambda block, carry, scale: block(carry, scale), scales)


def one_by_one(params, graph, x, scales):
    for block, scale in zip(layers(nnx.merge(graph, params)), scales, strict=True):
        x = block(x, scale)
    return x


def test_every_parameter_has_the_layers_in_front_each_from_its_own_key():
    stacked = make_stack()
    assert stacked.linear.kernel.shape == (DEPTH, DIM, DIM)
    assert stacked.linear.bias.shape == (DEPTH, DIM)
    kernels = np.asarray(stacked.linear.kernel)
    assert all(np.abs(kernels[i] - kernels[j]).max() > 0.01 for i in range(DEPTH) for j in range(i))


def test_scan_equals_the_layers_one_by_one(rng):
    graph, params = nnx.split(make_stack())
    arguments = params, graph, normal(rng, 2, DIM), normal(rng, DIM - 2)
    assert_parity(through_scan(*arguments), one_by_one(*arguments), 1e-6)


def test_without_xs_each_layer_gets_none(rng):
    stacked, x, seen = make_stack(), normal(rng, 2, DIM), []

    def layer(block, carry, given):
        seen.append(given)
        return block(carry)

    expected = x
    for block in layers(stacked):
        expected = block(expected)
    assert_parity(scan_stack(stacked, x, layer), expected, 1e-6)
    assert set(seen) == {None}


def test_carry_and_xs_are_any_pytree(rng):
    """The penultimate state, as the text encoders take it, and a dictionary of slices."""
    stacked, x = make_stack(), normal(rng, 2, DIM)
    xs = {"scale": normal(rng, DEPTH), "shift": normal(rng, DEPTH, 2, DIM)}

    def layer(block, carry, given):
        last, _ = carry
        return block(last, given["scale"]) + given["shift"], last

    states = [x]
    for i, block in enumerate(layers(stacked)):
        states.append(block(states[-1], xs["scale"][i]) + xs["shift"][i])
    last, penultimate = scan_stack(stacked, (x, x), layer, xs)
    assert_parity(last, states[-1], 1e-6)
    assert_parity(penultimate, states[-2], 1e-6)


def test_gradients_equal_those_of_the_layers_one_by_one(rng):
    graph, params = nnx.split(make_stack())
    x, scales = normal(rng, 2, DIM), normal(rng, DEPTH)

    def gradients(run):
        loss = lambda params, x, scales: jnp.sum(jnp.square(run(params, graph, x, scales)))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, x, scales)

    ours, expected = gradients(through_scan), gradients(one_by_one)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for ours_leaf, expected_leaf in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert_parity(ours_leaf, expected_leaf, 1e-5)
        assert np.abs(expected_leaf).max() > 0.01


def test_one_layer_is_traced_whatever_the_depth():
    traced = []

    class Counted(Block):
        def __call__(self, x, scale=1.0):
            traced.append(x.shape)
            return super().__call__(x, scale)

    stacked = stack(lambda rngs: Counted(DIM, rngs=rngs), 10, nnx.Rngs(0))
    scan_stack(stacked, jnp.ones((1, DIM)), lambda block, carry, _: block(carry))
    assert traced == [(1, DIM)]


def test_eval_shape_makes_the_structure_without_arrays():
    abstract, real = nnx.eval_shape(make_stack), make_stack()
    graph, shapes = nnx.split(abstract)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    expected_graph, params = nnx.split(real)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.to_pure_dict(shapes)) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), nnx.to_pure_dict(params)
    )
    out = jax.eval_shape(lambda params: through_scan(params, graph, jnp.ones((2, DIM)), jnp.ones(DEPTH)), shapes)
    assert out.shape == (2, DIM)
    assert graph == expected_graph


@pytest.mark.parametrize("depth", [0, -1])
def test_a_stack_needs_a_layer(depth):
    with pytest.raises(ValueError, match=f"depth is {depth}, a stack needs at least 1"):
        stack(lambda rngs: Block(DIM, rngs=rngs), depth, nnx.Rngs(0))


def test_quick_gelu_by_hand():
    x = np.array([-2.0, 0.0, 1.0], np.float32)
    np.testing.assert_allclose(quick_gelu(jnp.asarray(x)), x / (1 + np.exp(-1.702 * x)), rtol=1e-5)
