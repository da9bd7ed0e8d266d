"""The choice of kernel, and every implementation that runs here against the definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import port
import pytest
from parity import assert_parity
from training_case import make_mesh

from faithdiff_jax.models import attention as module
from faithdiff_jax.models.attention import attention, choose, use_implementation
from faithdiff_jax.models.backend import batches_placed, trace_for
from faithdiff_jax.sharding import batch_places


def normal(rng, *shape):
    return jnp.asarray(port.normal(rng, *shape))


def definition(q, k, v, causal=False):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize(
    ("platform", "queries", "keys", "dim", "dtype", "expected"),
    [
        ("cuda", 1024, 1024, 64, jnp.bfloat16, "cudnn"),
        ("cuda", 4096, 77, 64, jnp.float16, "cudnn"),
        ("cuda", 4096, 4096, 80, jnp.bfloat16, "cudnn"),
        ("cuda", 4096, 4096, 64, jnp.float32, "xla"),  # cuDNN's kernel takes 16-bit floats
        ("cuda", 16384, 16384, 512, jnp.bfloat16, "xla"),  # the VAE's head is too wide
        ("cuda", 64, 64, 4, jnp.bfloat16, "xla"),
        ("tpu", 4096, 4096, 64, jnp.bfloat16, "splash"),
        ("tpu", 1024, 1024, 64, jnp.bfloat16, "xla"),  # too short to pay
        ("tpu", 4096, 77, 64, jnp.bfloat16, "xla"),
        ("tpu", 4097, 4097, 64, jnp.bfloat16, "xla"),  # not whole blocks
        ("tpu", 16384, 16384, 512, jnp.bfloat16, "xla"),
        ("rocm", 4096, 4096, 64, jnp.bfloat16, "xla"),
        ("cpu", 4096, 4096, 64, jnp.float32, "heads"),
        ("cpu", 16384, 16384, 512, jnp.float32, "heads"),
        ("cpu", 4096, 77, 64, jnp.float32, "heads"),
        ("cpu", 256, 256, 64, jnp.float32, "heads"),
        ("cpu", 64, 77, 64, jnp.float32, "xla"),
    ],
)
def test_choice(platform, queries, keys, dim, dtype, expected):
    assert choose(platform, (2, queries, 10, dim), (2, keys, 10, dim), dtype) == expected


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (8, 8)])
def test_cudnn_sees_even_lengths_only(rng, monkeypatch, causal, queries, keys):
    """Its gradient refuses others, such as 77 text tokens. XLA computes in its place here."""
    shapes = []

    def computed_by_xla(q, k, v, *, is_causal, key_value_seq_lengths, implementation):
        assert implementation == "cudnn"
        shapes.append((q.shape[1], k.shape[1]))
        return xla(q, k, v, is_causal=is_causal, key_value_seq_lengths=key_value_seq_lengths, implementation="xla")

    xla = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", computed_by_xla)
    q, k, v = normal(rng, 2, queries, 3, 8), normal(rng, 2, keys, 3, 8), normal(rng, 2, keys, 3, 8)
    with use_implementation("cudnn"):
        assert_parity(attention(q, k, v, causal=causal), definition(q, k, v, causal), 1e-6)
    assert shapes == [(queries + queries % 2, keys + keys % 2)]


@pytest.mark.parametrize("causal", [False, True])
def test_xla_whole(rng, causal):
    q, k, v = normal(rng, 2, 9, 3, 8), normal(rng, 2, 9, 3, 8), normal(rng, 2, 9, 3, 8)
    assert_parity(attention(q, k, v, causal=causal), definition(q, k, v, causal), 1e-6)


@pytest.mark.parametrize("queries", [64, 61])
def test_xla_in_chunks(rng, monkeypatch, queries):
    q, k, v = normal(rng, 2, queries, 3, 8), normal(rng, 2, 40, 3, 8), normal(rng, 2, 40, 3, 8)
    monkeypatch.setattr(module, "SCORES_IN_MEMORY", 2 * 3 * 40 * 7)
    program = jax.jit(lambda q, k, v: module._xla(q, k, v, causal=False))
    assert_parity(program(q, k, v), definition(q, k, v), 1e-6)


@pytest.mark.parametrize(("queries", "chunk"), [(64, 1024), (61, 16), (64, 16)])
def test_head_by_head(rng, monkeypatch, queries, chunk):
    q, k, v = normal(rng, 2, queries, 3, 8), normal(rng, 2, 40, 3, 8), normal(rng, 2, 40, 3, 8)
    monkeypatch.setattr(module, "HEADS_QUERIES", chunk)
    assert_parity(jax.jit(module._heads)(10 * q, k, v), definition(10 * q, k, v), 1e-6)


def test_vae_sized_attention_never_holds_the_whole_score_matrix():
    """A 1024x1024 picture has 16,384 latent pixels: their score matrix alone would take 1 GiB."""
    tokens = jax.ShapeDtypeStruct((1, 16384, 1, 512), jnp.float32)
    compiled = jax.jit(attention).lower(tokens, tokens, tokens).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30


def test_splash_kernel_in_the_interpreter(rng):
    q, k, v = (normal(rng, 1, 1024, 2, 40) for _ in range(3))
    ours = jax.jit(lambda q, k, v: module._splash(q, k, v, interpret=True))(q, k, v)
    assert_parity(ours, definition(q, k, v), 1e-5)


@pytest.mark.parametrize("samples", [8, 3])
def test_splash_kernel_over_a_mesh(rng, samples):
    """Each device runs the kernel on its samples; those that do not divide are computed everywhere."""
    mesh = make_mesh(2, 4)
    q, k, v = (normal(rng, samples, 512, 1, 8) for _ in range(3))
    place = batch_places(mesh)

    def on_mesh(q, k, v):
        with batches_placed(place):
            return module._splash(q, k, v, interpret=True)

    placed = [jax.device_put(x, place(samples)) for x in (q, k, v)]
    ours = jax.jit(on_mesh, out_shardings=place(samples))(*placed)
    assert_parity(ours, definition(q, k, v), 1e-5)


def test_splash_kernel_is_lowered_for_a_mesh_of_tpus():
    """XLA cannot split it: SD 2.1's finest level has 4,096 tokens at 512x512."""
    place = batch_places(make_mesh(2, 4))
    tokens = jax.ShapeDtypeStruct((8, 4096, 5, 64), jnp.bfloat16, sharding=place(8))

    def loss(q):
        return jnp.sum(attention(q, q, q).astype(jnp.float32))

    def placed(q):
        with batches_placed(place):
            return jax.grad(loss)(q)

    for function, fits in ((placed, True), (jax.grad(loss), False)):
        with trace_for("tpu"):
            traced = jax.jit(function).trace(tokens)
        if fits:
            assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
        else:
            with pytest.raises(NotImplementedError, match="cannot be automatically partitioned"):
                traced.lower(lowering_platforms=("tpu",))


def test_bfloat16_keeps_the_softmax_in_float32(rng):
    q, k, v = (jnp.asarray(normal(rng, 1, 64, 2, 16), jnp.bfloat16) for _ in range(3))
    ours = attention(q, k, v)
    assert ours.dtype == jnp.bfloat16
    # Two 8-bit-mantissa roundings (of the weights and of the result) are what is left.
    assert_parity(ours.astype(jnp.float32), definition(q, k, v), 2e-2)


def test_forcing_an_implementation(rng, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "_splash", lambda q, k, v: seen.append(q.shape) or q)
    x = normal(rng, 1, 4, 1, 8)
    with use_implementation("splash"):
        attention(x, x, x)
    attention(x, x, x)
    assert seen == [x.shape]
    with pytest.raises(ValueError, match="implementation 'flash': must be one of cudnn, splash, heads, xla"):
        use_implementation("flash")


def test_tracing_for_another_platform(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "_splash", lambda q, k, v: seen.append(q.shape) or q)
    long, short = (jax.ShapeDtypeStruct((1, n, 10, 64), jnp.bfloat16) for n in (4096, 77))
    with trace_for("tpu"):
        jax.eval_shape(attention, long, long, long)
        jax.eval_shape(attention, long, short, short)
    jax.eval_shape(lambda q: attention(q, q, q), long)
    assert seen == [(1, 4096, 10, 64)]
    with pytest.raises(ValueError, match="platform 'gpu': must be one of cuda, rocm, tpu, cpu"):
        trace_for("gpu")
