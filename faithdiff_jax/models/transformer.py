"""The transformers of the UNet: blocks that attend to themselves and to the text, over the pixels of a feature map."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from faithdiff_jax.models.attention import attention
from faithdiff_jax.models.attribution import Maps, Shares, Words, shares
from faithdiff_jax.models.layers import Layers, map_stack, run_block, scan_stack
from faithdiff_jax.models.reuse import Attended, KeysValues, TextSource


class FeedForward(nnx.Module):
    """GEGLU: half of the projection gates the other half."""

    def __init__(self, dim: int, *, make: Layers):
        self.proj_in = make.linear(dim, 8 * dim)
        self.proj_out = make.linear(4 * dim, dim)

    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """(B, N, dim) -> (B, N, dim)."""
        hidden, gate = jnp.split(self.proj_in(tokens), 2, axis=-1)
        return self.proj_out(hidden * nnx.gelu(gate, approximate=False))


class MultiHeadAttention(nnx.Module):
    """Attention with keys and values from the same tokens or from a context; only the output has a bias."""

    def __init__(self, dim: int, context_dim: int, heads: int, *, make: Layers):
        self.heads = heads
        self.to_q = make.linear(dim, dim, use_bias=False)
        self.to_k = make.linear(context_dim, dim, use_bias=False)
        self.to_v = make.linear(context_dim, dim, use_bias=False)
        self.to_out = make.linear(dim, dim)

    def keys_values(self, context: Float[Array, "b m c"]) -> KeysValues:
        """(B, M, context_dim) -> keys and values, each (B, M, heads, dim / heads)."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def __call__(self, tokens: Float[Array, "b n c"], keys_values: KeysValues) -> Float[Array, "b n c"]:
        """(B, N, dim) and the pair from `keys_values` -> (B, N, dim)."""
        mixed = attention(self._split(self.to_q(tokens)), *keys_values)
        return self.to_out(mixed.reshape(tokens.shape))

    def shares(
        self, tokens: Float[Array, "texts pixels c"], keys: Float[Array, "texts m heads d"], words: Words
    ) -> Float32[Array, "texts pixels words"]:
        """What part of each pixel's attention goes to each word, summed over heads: `attribution.shares`."""
        return shares(self._split(self.to_q(tokens)), keys, words)

    def _split(self, x: Float[Array, "b n c"]) -> Float[Array, "b n heads d"]:
        return x.reshape(*x.shape[:-1], self.heads, -1)


class TransformerBlock(nnx.Module):
    """Self-attention, attention to the text, feed-forward; each normalised before and added after."""

    def __init__(self, dim: int, context_dim: int, heads: int, *, make: Layers):
        self.norm1 = make.layer_norm(dim, epsilon=1e-5)
        self.attn1 = MultiHeadAttention(dim, dim, heads, make=make)
        self.norm2 = make.layer_norm(dim, epsilon=1e-5)
        self.attn2 = MultiHeadAttention(dim, context_dim, heads, make=make)
        self.norm3 = make.layer_norm(dim, epsilon=1e-5)
        self.ff = FeedForward(dim, make=make)

    def __call__(self, tokens: Float[Array, "b n c"], text: TextSource) -> Float[Array, "b n c"]:
        """(B, N, dim) and the text's keys and values -> (B, N, dim)."""
        return self.evaluate(tokens, text, None)[0]

    def evaluate(
        self, tokens: Float[Array, "b n c"], text: TextSource, words: Words | None
    ) -> tuple[Float[Array, "b n c"], Shares | None, Attended]:
        """The same; the `shares` (n, N, W) of words (n, M, W) in the last n of the batch; and what the text gave.

        In the place of keys and values, `text` may be what it gave at an earlier evaluation.
        """
        normed = self.norm1(tokens)
        tokens = tokens + self.attn1(normed, self.attn1.keys_values(normed))
        found = None
        if isinstance(text, tuple):
            normed = self.norm2(tokens)
            found = None if words is None else self.attn2.shares(normed[-len(words) :], text[0][-len(words) :], words)
            attended = self.attn2(normed, text)
        else:
            attended = text
        tokens = tokens + attended
        return tokens + self.ff(self.norm3(tokens)), found, attended


class SpatialTransformer(nnx.Module):
    """A stack of transformer blocks over the pixels of a feature map, added to it."""

    def __init__(self, dim: int, context_dim: int, heads: int, depth: int, *, groups: int, make: Layers):
        self.norm = make.group_norm(dim, groups, epsilon=1e-6)
        self.proj_in = make.linear(dim, dim)
        self.blocks = make.stack(lambda make: TransformerBlock(dim, context_dim, heads, make=make), depth)
        self.proj_out = make.linear(dim, dim)

    def project_text(self, context: Float[Array, "b m c"]) -> KeysValues:
        """(B, M, context_dim) -> every block's keys and values, each (depth, B, M, heads, dim / heads)."""
        return map_stack(self.blocks.attn2, lambda layer: layer.keys_values(context))

    def __call__(self, x: Float[Array, "b h w c"], text: TextSource) -> Float[Array, "b h w c"]:
        """(B, H, W, dim) and the pair from `project_text` -> (B, H, W, dim)."""
        return self.evaluate(x, text, None)[0]

    def evaluate(
        self, x: Float[Array, "b h w c"], text: TextSource, words: Words | None, *, keep_attended: bool = False
    ) -> tuple[Float[Array, "b h w c"], Maps | None, Attended | None]:
        """The same; the `shares` of the words (n, M, W), summed over the blocks, as maps (n, H, W, W'); what text gave.

        The last is (depth, B, H * W, dim), None unless it is to be kept. It may be `text` at a later evaluation.
        """
        tokens = self.proj_in(run_block(self.norm, x).reshape(x.shape[0], -1, x.shape[-1]))
        total = kept = None
        if words is not None:
            total = jnp.zeros((len(words), tokens.shape[1], words.shape[-1]), jnp.float32)
        depth = jax.tree.leaves(text)[0].shape[0]
        if keep_attended:
            kept = jnp.zeros((depth, *tokens.shape), tokens.dtype)

        def run(block: TransformerBlock, carry: tuple[Array, Any, Any], layer: tuple[Any, Any]) -> tuple[Any, ...]:
            (tokens, total, kept), (text, number) = carry, layer
            tokens, found, attended = block.evaluate(tokens, text, words)
            if kept is not None:
                kept = kept.at[number].set(attended)
            return tokens, jax.tree.map(jnp.add, total, found), kept

        numbers = jnp.arange(depth) if keep_attended else None
        tokens, total, kept = scan_stack(self.blocks, (tokens, total, kept), run, (text, numbers))
        maps = None if total is None else total.reshape(len(total), *x.shape[1:3], -1)
        return x + self.proj_out(tokens).reshape(x.shape), maps, kept
