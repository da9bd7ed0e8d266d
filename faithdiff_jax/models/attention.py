"""Scaled dot-product attention: one function, and the choice of the kernel that computes it.

(q, k, v) -> choose by backend, shape and dtype -> cuDNN flash | TPU splash | XLA, in query chunks when large
"""

import contextlib
import contextvars
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from faithdiff_jax.models.backend import batch_place, platform, setting

Queries = Float[Array, "b n heads d"]
KeysOrValues = Float[Array, "b m heads d"]

IMPLEMENTATIONS = ("cudnn", "splash", "heads", "xla")

# A score matrix of more elements than this is never held whole: its queries go through in chunks.
SCORES_IN_MEMORY = 2**26
# Below this many tokens XLA's own attention is as fast on TPU as a flash kernel (MaxDiffusion draws the same line).
SPLASH_TOKENS = 4096
SPLASH_BLOCK = 512
# On CPU: from this many scores a head, and with this many queries at a time, going head by head pays.
HEADS_SCORES = 2**16
HEADS_QUERIES = 1024

_implementation: contextvars.ContextVar[str | None] = contextvars.ContextVar("implementation", default=None)


@jax.named_scope("attention")
def attention(q: Queries, k: KeysOrValues, v: KeysOrValues, *, causal: bool = False) -> Queries:
    """Softmax(q k^T / sqrt(dim)) v, with the softmax in float32.

    Args:
        q: (batch, queries, heads, dim).
        k: (batch, keys, heads, dim).
        v: (batch, keys, heads, dim).
        causal: query i sees keys 0..i only.

    Returns:
        (batch, queries, heads, dim), in q's dtype.
    """
    implementation = _implementation.get() or choose(platform(), q.shape, k.shape, q.dtype, causal=causal)
    if implementation == "cudnn":
        return _cudnn(q, k, v, causal)
    if implementation == "splash":
        return _splash(q, k, v)
    if implementation == "heads":
        return _heads(q, k, v)
    return _xla(q, k, v, causal)


def choose(
    platform: str, q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: DTypeLike, *, causal: bool = False
) -> str:
    """Name the implementation for these operands: one of `IMPLEMENTATIONS`.

    cuDNN takes 16-bit floats and head sizes up to 128 in steps of 8; the TPU kernel pays from 4,096 tokens up and
    wants whole blocks; a CPU is fastest with one head's scores in its cache; everything else is XLA's.
    """
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    queries, keys, dim = q_shape[1], k_shape[1], q_shape[-1]
    if platform == "cuda" and half and dim % 8 == 0 and dim <= 128:
        return "cudnn"
    whole_blocks = queries % SPLASH_BLOCK == 0 and keys % SPLASH_BLOCK == 0
    if platform == "tpu" and not causal and dim <= 128 and min(queries, keys) >= SPLASH_TOKENS and whole_blocks:
        return "splash"
    if platform == "cpu" and not causal and queries * keys >= HEADS_SCORES:
        return "heads"
    return "xla"


def use_implementation(name: str) -> contextlib.AbstractContextManager[None]:
    """Force one implementation for everything traced inside, to compare or to debug."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {name!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
    return setting(_implementation, name)


def _cudnn(q: Queries, k: KeysOrValues, v: KeysOrValues, causal: bool) -> Queries:
    """cuDNN's flash attention; odd lengths (77 text tokens) are filled up, since its gradient takes even ones only."""
    batch, queries, _, _ = q.shape
    keys = k.shape[1]

    def even(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

    # A causal mask hides the key that was added from every query but the one that was added.
    lengths = jnp.full((batch,), keys, jnp.int32) if keys % 2 and not causal else None
    out = jax.nn.dot_product_attention(
        even(q), even(k), even(v), is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :queries]


def _xla(q: Queries, k: KeysOrValues, v: KeysOrValues, causal: bool) -> Queries:
    """Plain attention; when the score matrix would be large, a loop over query chunks keeps one chunk's scores."""
    batch, queries, heads, _ = q.shape
    chunks = math.ceil(batch * heads * queries * k.shape[1] / SCORES_IN_MEMORY)
    if chunks == 1 or causal:
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="xla")
    parts = _chunked(q.swapaxes(0, 1), math.ceil(queries / chunks)).swapaxes(1, 2)
    out: Array = jax.lax.map(lambda part: jax.nn.dot_product_attention(part, k, v, implementation="xla"), parts)
    return out.swapaxes(0, 1).reshape(batch, -1, heads, q.shape[-1])[:, :queries]


def _heads(q: Queries, k: KeysOrValues, v: KeysOrValues) -> Queries:
    """One head, and at most `HEADS_QUERIES` of its queries, after the other."""
    batch, queries, heads, dim = q.shape

    def by_head(x: Array) -> Array:  # (batch, tokens, heads, dim) -> (batch * heads, tokens, dim)
        return x.swapaxes(1, 2).reshape(batch * heads, -1, dim)

    def head(operands: tuple[Array, Array, Array]) -> Array:
        q, k, v = operands

        def some(q: Array) -> Array:
            scores = ((q * dim**-0.5) @ k.T).astype(jnp.float32)
            weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
            return (weights.astype(v.dtype) @ v) / weights.sum(axis=-1, keepdims=True).astype(v.dtype)

        mixed: Array = jax.lax.map(some, _chunked(q, min(HEADS_QUERIES, queries)))
        return mixed.reshape(-1, dim)[:queries]

    out: Array = jax.lax.map(head, (by_head(q), by_head(k), by_head(v)))
    return out.reshape(batch, heads, queries, dim).swapaxes(1, 2)


def _chunked(x: Array, chunk: int) -> Array:
    """(n, ...) -> (ceil(n / chunk), chunk, ...), filled up with zeros."""
    padded = jnp.pad(x, ((0, -len(x) % chunk), *((0, 0),) * (x.ndim - 1)))
    return padded.reshape(-1, chunk, *x.shape[1:])


def _splash(q: Queries, k: KeysOrValues, v: KeysOrValues, *, interpret: bool = False) -> Queries:
    """TPU flash attention (Pallas splash kernel, no mask). Zeros pad head sizes under 128, which is exact.

    XLA cannot split the kernel over a mesh: each device is told to run it on its own samples.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    _, queries, heads, dim = q.shape
    mask = splash_attention_mask.FullMask((queries, k.shape[1]))
    block = SPLASH_BLOCK
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * heads), block_sizes=sizes, interpret=interpret
    )
    pad = [(0, 0)] * 3 + [(0, -dim % 128)]
    # The kernel does not scale; it takes (heads, tokens, dim) and is mapped over the batch.
    operands = [jnp.pad(x, pad).swapaxes(1, 2) for x in (q * dim**-0.5, k, v)]
    of_samples, place = jax.vmap(kernel), batch_place(len(q))
    if place is not None:
        of_samples = jax.shard_map(
            of_samples, mesh=place.mesh, in_specs=place.spec, out_specs=place.spec, check_vma=False
        )
    mixed: Array = of_samples(*operands)
    return mixed.swapaxes(1, 2)[..., :dim].astype(q.dtype)
