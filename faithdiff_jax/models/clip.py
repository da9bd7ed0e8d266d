"""The CLIP text encoder: OpenAI's CLIP-L, OpenCLIP's bigG with its projection, and OpenCLIP's H as SD 2.1 uses it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from faithdiff_jax.models.attention import attention
from faithdiff_jax.models.layers import Layers, quick_gelu, scan_stack
from faithdiff_jax.models.sizes import LARGEST_WIDTH, MOST_LAYERS, check_sizes


def exact_gelu(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """GELU through the error function, as OpenCLIP has it."""
    return jax.nn.gelu(values, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": exact_gelu}
LARGEST_VOCABULARY = 10_000_000
OUTPUTS = ("penultimate", "final")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Sizes and choices of one text encoder; the defaults are CLIP-L's.

    bigG (SDXL's second): width 1280, layers 32, heads 20, mlp_width 5120, activation gelu, projection 1280.
    H (SD 2.1, stored without its last layer): width 1024, layers 23, heads 16, mlp_width 4096, activation gelu,
    output final.

    `output` says which hidden state is handed out: "penultimate", the last layer's input, not normalised (SDXL), or
    "final", the last layer's output after the final layer norm (SD 2.1). `projection` is the width of the pooled
    projection, None where there is none. `end_token` ends a caption; the pooled state is taken at the first one.
    """

    vocab_size: int = 49408
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    positions: int = 77
    activation: str = "quick_gelu"
    projection: int | None = None
    output: str = "penultimate"
    end_token: int = 49407

    def __post_init__(self) -> None:
        check_sizes(self, 1, LARGEST_WIDTH, "width", "heads", "mlp_width", "positions", "projection")
        check_sizes(self, 1, MOST_LAYERS, "layers")
        check_sizes(self, 1, LARGEST_VOCABULARY, "vocab_size")
        check_sizes(self, 0, LARGEST_VOCABULARY, "end_token")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}: must be a multiple of heads, {self.heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}: must be one of {', '.join(ACTIVATIONS)}")
        if self.output not in OUTPUTS:
            raise ValueError(f"output is {self.output!r}: must be one of {', '.join(OUTPUTS)}")
        if not 0 <= self.end_token < self.vocab_size:
            raise ValueError(f"end_token is {self.end_token}: must be in 0..{self.vocab_size - 1} (vocab_size - 1)")


class TextBlock(nnx.Module):
    """One layer: causal self-attention, then an MLP, each after a layer norm and added back."""

    def __init__(self, config: TextEncoderConfig, *, make: Layers):
        width = config.width
        self.heads = config.heads
        self.activation = config.activation
        self.layer_norm1 = make.layer_norm(width, epsilon=1e-5)
        self.q_proj = make.linear(width, width)
        self.k_proj = make.linear(width, width)
        self.v_proj = make.linear(width, width)
        self.out_proj = make.linear(width, width)
        self.layer_norm2 = make.layer_norm(width, epsilon=1e-5)
        self.fc1 = make.linear(width, config.mlp_width)
        self.fc2 = make.linear(config.mlp_width, width)

    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """(B, N, width) -> (B, N, width); a token sees itself and those before it."""
        tokens = tokens + self.attend(self.layer_norm1(tokens))
        hidden = ACTIVATIONS[self.activation](self.fc1(self.layer_norm2(tokens)))
        return tokens + self.fc2(hidden)

    def attend(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Attend over the earlier tokens: (B, N, width) -> (B, N, width)."""
        split = (*tokens.shape[:2], self.heads, tokens.shape[2] // self.heads)
        query, key, value = (project(tokens).reshape(split) for project in (self.q_proj, self.k_proj, self.v_proj))
        mixed = attention(query, key, value, causal=True)
        return self.out_proj(mixed.reshape(tokens.shape))


class TextEncoder(nnx.Module):
    """Token ids to one state a token and one pooled state a caption (Radford et al. 2021, section 2.4).

    `blocks` holds all layers as one module, stacked on a leading axis. `dtype` is what the layers compute in (None:
    as the parameters are); layer norm statistics and the softmax stay in float32.
    """

    def __init__(
        self,
        config: TextEncoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        make = Layers(rngs, dtype, param_dtype)
        self.config = config
        self.token_embedding = make.embedding(config.vocab_size, config.width)
        self.position_embedding = make.embedding(config.positions, config.width)
        self.blocks = make.stack(lambda make: TextBlock(config, make=make), config.layers)
        self.final_layer_norm = make.layer_norm(config.width, epsilon=1e-5)
        self.text_projection = (
            None if config.projection is None else make.linear(config.width, config.projection, use_bias=False)
        )

    def __call__(
        self, token_ids: Integer[Array, "b n"], constrain: Callable[[Array], Array] = lambda x: x
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b p"]]:
        """Encode captions: (B, N) integers -> hidden (B, N, width), pooled (B, projection or width).

        `constrain` lays a batch out over devices; embedded tokens would lie as the table does that they are taken from.
        A row without an end token is pooled at its first token, as the published encoders do.

        Raises:
            ValueError: N is above `positions`.
        """
        length = token_ids.shape[1]
        if length > self.config.positions:
            raise ValueError(f"{length} tokens a caption, the text encoder has {self.config.positions} positions")
        tokens = constrain(self.token_embedding(token_ids) + self.position_embedding(jnp.arange(length))[None])

        # Carrying the layer's input along with its output yields the penultimate state without keeping all of them,
        # and without cutting the last layer's parameters out of the stack.
        def layer(block: TextBlock, carry: tuple[Array, Array], _: Any) -> tuple[Array, Array]:
            tokens, _ = carry
            return block(tokens), tokens

        last, penultimate = scan_stack(self.blocks, (tokens, tokens), layer)
        hidden = penultimate if self.config.output == "penultimate" else self.final_layer_norm(last)
        return hidden, self.pool(last, token_ids)

    def pool(self, last: Float[Array, "b n d"], token_ids: Integer[Array, "b n"]) -> Float[Array, "b p"]:
        """Pick each caption's state at its first end token, normalise and project it.

        `last` (B, N, width) is the last layer's output. Folders whose config has `eos_token_id` 2 ask transformers
        for the largest id instead of the end token: the same place, the end token being the vocabulary's last.
        """
        first_end = jnp.argmax(token_ids == self.config.end_token, axis=1)
        pooled = self.final_layer_norm(last[jnp.arange(len(last)), first_end])
        return pooled if self.text_projection is None else self.text_projection(pooled)
