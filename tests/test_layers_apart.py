"""Layers that are arrays of their own: the same results as in a loop, no loop, and no second copy of the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from converted import loaded, published_and_converted
from flax import nnx
from parity import assert_parity
from port import normal
from test_layers import DEPTH, DIM, make_stack, through_scan
from test_pipeline import photograph

from faithdiff_jax import FaithDiff
from faithdiff_jax.inference import pipeline
from faithdiff_jax.models.layers import APART_BYTES, Apart, layers_apart, map_stack, rematerialise
from faithdiff_jax.models.parts import Params


def apart(params: Params) -> Params:
    return layers_apart(params, 0)


def is_apart(leaf: object) -> bool:
    return isinstance(leaf, Apart)


@pytest.fixture
def all_apart(monkeypatch):
    """Every stack's layers apart, however small."""
    monkeypatch.setattr(pipeline, "layers_apart", apart)


@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_stack_equals_its_loop(rng, policy):
    graph, state = nnx.split(make_stack())
    taken = apart({"blocks": nnx.to_pure_dict(state)})["blocks"]
    assert all(map(is_apart, jax.tree.leaves(taken, is_leaf=is_apart)))
    x, scales = normal(rng, 2, DIM), normal(rng, DEPTH)
    with rematerialise(policy):
        assert_parity(through_scan(taken, graph, x, scales), through_scan(state, graph, x, scales), 1e-6)
        gradients = [
            jax.grad(lambda params: through_scan(params, graph, x, scales).sum())(params) for params in (taken, state)
        ]
    assert_parity(jnp.stack(gradients[0]["linear"]["kernel"].layers), gradients[1].linear.kernel, 1e-6)
    mapped, expected = (map_stack(nnx.merge(graph, params), lambda block: block(x)) for params in (taken, state))
    assert_parity(mapped, expected, 1e-6)
    assert expected.shape == (DEPTH, 2, DIM)


def test_only_large_parameters_of_stacks_are_taken_apart():
    large, small = jnp.zeros((3, APART_BYTES // 8, 2)), jnp.zeros((3, APART_BYTES // 4 - 1))
    params = {
        "blocks": {"kernel": large, "bias": small},
        "kernel": large,
        "aligner": {"blocks": {0: {"kernel": large}}},
    }
    taken = layers_apart([params])[0]
    assert [layer.shape for layer in taken["blocks"]["kernel"].layers] == [(APART_BYTES // 8, 2)] * 3
    assert taken["blocks"]["bias"] is small
    assert taken["kernel"] is large
    assert taken["aligner"] == params["aligner"]


def test_of_shapes_it_gives_shapes():
    whole = {"blocks": {"kernel": jnp.zeros((2, 64, 3), jnp.bfloat16)}}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), whole)
    assert jax.tree.map(jnp.shape, jax.tree.leaves(apart(shapes))) == jax.tree.map(
        jnp.shape, jax.tree.leaves(apart(whole))
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(apart(shapes))} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("of", [np.asarray, jnp.asarray])
def test_the_memory_is_shared(of):
    kernel = jnp.arange(3 * APART_BYTES // 4, dtype=jnp.float32).reshape(3, -1, 4)
    taken = layers_apart({"blocks": {"kernel": of(kernel)}})["blocks"]["kernel"]
    start = kernel.unsafe_buffer_pointer()
    assert [layer.unsafe_buffer_pointer() - start for layer in taken.layers] == [0, APART_BYTES, 2 * APART_BYTES]
    np.testing.assert_array_equal(jnp.stack(taken.layers), kernel)


@pytest.mark.parametrize("options", [{"tgate_after": 0.5, "deepcache_interval": 2}, {"guidance": 1.0}])
def test_a_picture_is_the_same(all_apart, options):
    model, image = loaded(), photograph(19, 22)
    options = {"steps": 4, "scale": 2.0, **options}
    taken = model.restore(image, "two words", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "layers_apart", lambda params: params)
        whole = model.restore(image, "two words", **options)
    assert np.abs(taken.astype(int) - whole).max() <= 1
    assert whole.std() > 1


def test_texts_and_one_evaluation_are_the_same_and_no_loop_is_left(rng, all_apart):
    model = loaded()
    latents, features = normal(rng, 1, 8, 8, 4), normal(rng, 1, 8, 8, 32)

    def evaluated() -> tuple[jax.Array, ...]:
        context, pooled = model.encode_text(["two words"])
        time_ids = np.array([[64, 64, 0, 0, 64, 64]], np.float32)
        arguments = latents, np.array([300]), features, context, pooled, time_ids
        text = model.programs.predict_noise.lower(model.denoiser_params, *arguments).as_text()
        return context, pooled, model.predict_noise(*arguments), text.count("stablehlo.while")

    *taken, loops = evaluated()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "layers_apart", lambda params: params)
        *whole, loops_before = evaluated()
    for ours, expected in zip(taken, whole, strict=True):
        assert_parity(ours, expected, 1e-5)
    assert (loops, loops_before > 0) == (0, True)


def test_weights_in_8_bits_are_the_same(all_apart, monkeypatch):
    model = FaithDiff.load(published_and_converted()[1], quantized="int8")
    image = photograph(19, 22)
    taken = model.restore(image, steps=2, scale=2.0)
    monkeypatch.setattr(pipeline, "layers_apart", lambda params: params)
    assert np.abs(taken.astype(int) - model.restore(image, steps=2, scale=2.0)).max() <= 1
