"""Rematerialisation: the same values and gradients, less kept between the passes, only where it is asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from parity import assert_parity
from port import normal

from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.faithdiff import FaithDiffModel
from faithdiff_jax.models.layers import POLICIES, rematerialise, run_block, scan_stack, stack
from faithdiff_jax.models.unet import UNet
from faithdiff_jax.models.unet_config import UNetConfig
from faithdiff_jax.models.vae import VAE, FeatureEncoder, VAEConfig
from faithdiff_jax.training.config import REMATERIALISATIONS

UNET = UNetConfig(
    channels=(8, 16),
    resnets_per_level=1,
    transformer_depth=(0, 2),
    mid_transformer_depth=1,
    heads=(1, 2),
    context_dim=6,
    pooled_dim=None,
    norm_groups=4,
)
ENCODER = VAEConfig(channels=(8, 16), resnets_per_level=1, norm_groups=4)
MODELS = ("unet", "lq_encoder", "aligner", "aligner, batch")
# What `jax.checkpoint` leaves in a program.
REMATERIALISED = jax.make_jaxpr(jax.checkpoint(jnp.sin))(1.0).eqns[0].primitive.name
# ResNet blocks, stacks and the norms before them; ResNet blocks and the attention; condition embedding and blocks.
BLOCKS = {"unet": 8 + 2 * 4, "lq_encoder": 2 + 3, "aligner": 3, "aligner, batch": 3}


@functools.cache
def case(name: str):
    """(function of (parameters, arrays), parameters, arrays) of a model whose layers are all at work."""
    rng = np.random.default_rng(0)
    call = lambda module, *arrays: module(*arrays)  # noqa: E731
    if name == "unet":
        module = UNet(UNET, rngs=nnx.Rngs(0))
        arrays = normal(rng, 2, 16, 16, 4), np.array([3.0, 700.0], np.float32), normal(rng, 2, 7, 6)
    elif name == "lq_encoder":
        module, arrays = FeatureEncoder(ENCODER.encoder, rngs=nnx.Rngs(0)), (normal(rng, 1, 32, 32, 3),)
    else:
        mixing = "batch" if name.endswith("batch") else "none"
        config = AlignmentConfig(mixing=mixing, heads=2, norm_groups=4)
        module = FaithDiffModel(UNET, config, ENCODER.encoder, rngs=nnx.Rngs(0)).denoiser.alignment
        arrays = normal(rng, 2, 4, 4, 8), normal(rng, 2, 4, 4, 16)
        call = lambda module, hidden, features: module(hidden, module.embed(features))  # noqa: E731
    graph, parameters = nnx.split(module)
    # Layers that start at zero would hide what is behind them.
    parameters = jax.tree.map(lambda leaf: leaf + 0.1 * normal(rng, *leaf.shape), parameters)
    return lambda parameters, *arrays: call(nnx.merge(graph, parameters), *arrays), parameters, arrays


def under(policy: str, function):
    """`function` traced under a policy."""

    def traced(*arguments):
        with rematerialise(policy):
            return function(*arguments)

    return traced


@functools.cache
def differentiated(name: str, policy: str):
    """The compiled program of a loss and its gradients, and what it gives."""
    function, *arguments = case(name)
    loss = lambda *arguments: jnp.sum(jnp.square(function(*arguments)))  # noqa: E731
    arguments = (arguments[0], *arguments[1])
    program = jax.jit(jax.value_and_grad(under(policy, loss), argnums=(0, 1))).lower(*arguments).compile()
    return program, program(*arguments)


def kept_bytes(name: str, policy: str) -> int:
    """What waits for the backward pass, the parameters and inputs themselves included."""
    function, parameters, arrays = case(name)
    pullback = lambda *arguments: jax.vjp(under(policy, function), *arguments)[1]  # noqa: E731
    kept = jax.tree.leaves(jax.eval_shape(pullback, parameters, *arrays))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)


def checkpoints(jaxpr) -> int:
    """Rematerialised regions of a program, those inside of loops included; a loop's body counts once."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == REMATERIALISED
        found += sum(checkpoints(inner) for inner in jaxprs_in_params(equation.params))
    return found


def traced(function, *arguments):
    """The program of a function, traced anew: JAX keeps what it has traced, by the function."""
    return jax.make_jaxpr(lambda *arguments: function(*arguments))(*arguments).jaxpr


@pytest.mark.parametrize("policy", ["full", "dots"])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_without(name, policy):
    _, (loss, gradients) = differentiated(name, "none")
    _, (loss_again, gradients_again) = differentiated(name, policy)
    assert_parity(loss_again, loss, 1e-6)
    assert jax.tree.structure(gradients) == jax.tree.structure(gradients_again)
    # Some gradients are zero but for rounding: a softmax does not see its keys' bias, a norm not what it removes.
    rounding = 1e-6 * max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))
    for leaf, again in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_again), strict=True):
        np.testing.assert_allclose(again, leaf, rtol=0, atol=rounding + 1e-5 * float(jnp.abs(leaf).max()))


def test_offloaded_inputs_wait_in_the_memory_of_the_host():
    """With the values and gradients of "full", which computes the same again."""
    function, parameters, arrays = case("unet")
    loss = lambda *arguments: jnp.sum(jnp.square(function(*arguments)))  # noqa: E731
    hosts = {
        policy: str(traced(jax.grad(under(policy, loss)), parameters, *arrays)).count("<host>")
        for policy in ("full", "offload")
    }
    assert hosts["full"] == 0
    # Going there, waiting and coming back; a stack's twice, as it is and as its layers' scan sees it.
    assert hosts["offload"] >= BLOCKS["unet"]
    _, (value, gradients) = differentiated("unet", "full")
    _, (value_again, gradients_again) = differentiated("unet", "offload")
    assert_parity(value_again, value, 1e-6)
    for leaf, again in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_again), strict=True):
        np.testing.assert_allclose(again, leaf, rtol=0, atol=1e-6 + 1e-5 * float(jnp.abs(leaf).max()))


@pytest.mark.parametrize("name", MODELS)
def test_less_is_kept_for_the_backward_pass(name):
    none, dots, full = (kept_bytes(name, policy) for policy in ("none", "dots", "full"))
    assert full < dots < none
    if name in ("unet", "lq_encoder"):
        assert full < none / 4


def test_the_compiled_program_needs_less_memory():
    """On CPU this shows at stacks alone: there the compiler merges what is computed twice outside of loops."""
    none, full = (differentiated("unet", policy)[0].memory_analysis() for policy in ("none", "full"))
    assert full.temp_size_in_bytes < none.temp_size_in_bytes / 2


@pytest.mark.parametrize("name", MODELS)
def test_every_block_is_rematerialised_and_without_a_policy_none(name):
    function, parameters, arrays = case(name)
    plain = traced(function, parameters, *arrays)
    assert checkpoints(plain) == 0
    assert str(traced(under("none", function), parameters, *arrays)) == str(plain)
    assert checkpoints(traced(under("full", function), parameters, *arrays)) == BLOCKS[name]


def test_the_decoder_is_made_of_the_same_blocks(rng):
    graph, parameters = nnx.split(VAE(ENCODER, rngs=nnx.Rngs(0)))
    decode = lambda parameters, latents: nnx.merge(graph, parameters).decode(latents)  # noqa: E731
    latents = normal(rng, 1, 4, 4, 4)
    assert checkpoints(traced(decode, parameters, latents)) == 0
    assert checkpoints(traced(under("full", decode), parameters, latents)) == 2 * 2 + 3


def test_it_ends_with_its_context_also_by_an_error_and_nests(rng):
    function, parameters, arrays = case("lq_encoder")
    count = lambda: checkpoints(traced(function, parameters, *arrays))  # noqa: E731
    with rematerialise("full"):
        assert count() == BLOCKS["lq_encoder"]
        with rematerialise("none"):
            assert count() == 0
        assert count() == BLOCKS["lq_encoder"]
    assert count() == 0
    with pytest.raises(KeyError), rematerialise("dots"):
        raise KeyError
    assert count() == 0


@pytest.mark.parametrize("policy", ["", "all", "Full"])
def test_unknown_policy(policy):
    with pytest.raises(ValueError, match=f"rematerialisation is '{policy}': must be one of none, full, dots, offload"):
        rematerialise(policy)
    assert tuple(POLICIES) == REMATERIALISATIONS


def test_a_block_runs_once_forwards_whatever_it_is_called_by():
    linear, runs = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), []

    def twice(block, x, other):
        runs.append(x.shape)
        return block(x) + 2 * block(other["more"])

    x = jnp.ones((1, 2))
    with rematerialise("full"):
        again = run_block(linear, x, {"more": 3 * x}, call=twice)
        assert_parity(run_block(linear, x), linear(x), 1e-6)
    assert_parity(again, linear(x) + 2 * linear(3 * x), 1e-6)
    assert runs == [(1, 2)]


def test_a_stack_keeps_its_carries_alone():
    stacked = stack(lambda rngs: nnx.Linear(6, 6, rngs=rngs), 5, nnx.Rngs(0))
    graph, parameters = nnx.split(stacked)

    def run(parameters, x):
        return scan_stack(nnx.merge(graph, parameters), x, lambda block, x, _: jnp.tanh(block(jnp.sin(x))))

    def kept(policy):
        pullback = jax.eval_shape(lambda *a: jax.vjp(under(policy, run), *a)[1], parameters, jnp.ones((3, 6)))
        return sorted(leaf.shape for leaf in jax.tree.leaves(pullback))

    assert kept("full") == sorted([(5, 3, 6), (5, 6, 6), (5, 6)])
    assert len(kept("none")) > 3
