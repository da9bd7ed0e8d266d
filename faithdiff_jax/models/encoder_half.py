"""The half of the UNet that encodes: its first convolution, its embeddings, the way down and the middle.

The UNet is this and a way up. ControlNet is a copy of it with outputs of its own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Real

from faithdiff_jax.models.blocks import Downsample, ResnetBlock, Upsample
from faithdiff_jax.models.layers import Layers, run_block
from faithdiff_jax.models.reuse import TextKeysValues, TextSource, TextSources
from faithdiff_jax.models.steering import UNSTEERED, Steering
from faithdiff_jax.models.transformer import SpatialTransformer
from faithdiff_jax.models.unet_config import UNetConfig

Transform = Callable[[SpatialTransformer, Array, TextSource], Array]
"""Runs a transformer on (B, H, W, dim) with what it attends to."""


def sinusoidal_embedding(positions: Real[Array, "*shape"], dim: int) -> Float32[Array, "*shape {dim}"]:
    """(...,) numbers -> (..., dim), even: cosines first, then sines, wavelengths up to 10,000 (Ho et al. 2020)."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(10_000) / half * jnp.arange(half, dtype=jnp.float32))
    angles = positions.astype(jnp.float32)[..., None] * frequencies.reshape((1,) * positions.ndim + (half,))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class EmbeddingMLP(nnx.Module):
    """Two linear layers with a SiLU between; with `condition_dim` a condition of that width may be added in front.

    The condition's projection starts at zero. Source: `TimestepEmbedding` of diffusers.
    """

    def __init__(self, in_dim: int, dim: int, condition_dim: int | None = None, *, make: Layers):
        if condition_dim is not None:
            self.cond_proj = make.linear(condition_dim, in_dim, use_bias=False, zeros=True)
        self.linear_1 = make.linear(in_dim, dim)
        self.linear_2 = make.linear(dim, dim)

    def __call__(self, x: Float[Array, "b i"], condition: Float[Array, "b c"] | None = None) -> Float[Array, "b d"]:
        """(B, in_dim), (B, condition_dim) -> (B, dim)."""
        if condition is not None:
            x = x + self.cond_proj(condition)
        return self.linear_2(nnx.silu(self.linear_1(x)))


GUIDANCE_SCALE = 100
"""What the guidance weight is multiplied by before it is embedded: weights of 1 to 10 lie as timesteps do."""


class UNetLevel(nnx.Module):
    """The ResNet blocks of one level with their transformers, and the change of size behind them."""

    def __init__(
        self,
        resnets: Sequence[ResnetBlock],
        attentions: Sequence[SpatialTransformer],
        resample: Downsample | Upsample | None,
    ):
        self.resnets = nnx.List(resnets)
        self.attentions = nnx.List(attentions)
        self.resample: Any = resample


class EncoderHalf(nnx.Module):
    """The UNet from its first convolution to its middle, by the published names of its modules."""

    def __init__(self, config: UNetConfig, *, make: Layers):
        self.config = config
        widths = config.channels
        self.conv_in = make.conv3x3(config.in_channels, widths[0])
        self.time_embedding = EmbeddingMLP(widths[0], config.embedding_dim, config.guidance_dim, make=make)
        self.add_embedding = (
            EmbeddingMLP(config.pooled_dim + 6 * config.time_id_dim, config.embedding_dim, make=make)
            if config.pooled_dim is not None
            else None
        )

        last = len(widths) - 1
        down = []
        for level, width in enumerate(widths):
            below = widths[max(level - 1, 0)]
            resnets = [
                make_resnet(config, below if i == 0 else width, width, make) for i in range(config.resnets_per_level)
            ]
            attentions = make_transformers(config, level, len(resnets), config.transformer_depth[level], make)
            downsample = Downsample(width, padding=1, make=make) if level < last else None
            down.append(UNetLevel(resnets, attentions, downsample))
        self.down_blocks = nnx.List(down)

        self.mid_block = UNetLevel(
            [make_resnet(config, widths[-1], widths[-1], make) for _ in range(2)],
            make_transformers(config, last, 1, config.mid_transformer_depth, make),
            None,
        )

    def embed_timesteps(
        self, timesteps: Real[Array, "b"], guidance: Real[Array, "b"] | None = None
    ) -> Float[Array, "b e"]:
        """(B,) timesteps in 0..999 -> (B, embedding_dim).

        `guidance` is the weight, for a UNet with `guidance_dim`; None stands for 1, no guidance. Others do not read it.
        """
        times = sinusoidal_embedding(timesteps, self.config.channels[0])
        if self.config.guidance_dim is None:
            return self.time_embedding(times)
        weights = jnp.ones(timesteps.shape) if guidance is None else guidance
        return self.time_embedding(times, sinusoidal_embedding(GUIDANCE_SCALE * weights, self.config.guidance_dim))

    def embed_added(
        self, pooled: Float[Array, "b p"] | None, time_ids: Real[Array, "b 6"] | None
    ) -> Float[Array, "_ e"]:
        """(B, pooled_dim), (B, 6) sizes and crop in pixels -> (B, embedding_dim); (1, ...) zeros for a UNet without."""
        if self.add_embedding is None:
            return jnp.zeros((1, self.config.embedding_dim))
        if pooled is None or time_ids is None:
            raise ValueError("pooled and time_ids are needed: this UNet has an added embedding")
        ids = sinusoidal_embedding(time_ids, self.config.time_id_dim).reshape(time_ids.shape[0], -1)
        return self.add_embedding(jnp.concatenate([pooled.astype(ids.dtype), ids], axis=-1))

    def project_text(self, context: Float[Array, "b m d"]) -> TextKeysValues:
        """(B, M, context_dim) -> keys and values for every transformer, in the order in which data meets them."""
        return [transformer.project_text(context) for level in self.levels for transformer in level.attentions]

    @property
    def levels(self) -> list[UNetLevel]:
        """In the order in which data goes through them: down, the middle."""
        return [*self.down_blocks, self.mid_block]

    @property
    def transformers(self) -> int:
        """How many transformers there are: those of SDXL's UNet are stacks of blocks."""
        return sum(len(level.attentions) for level in self.levels)

    def of_levels(self, text: TextSources) -> list[list[TextSource]]:
        """What each level's transformers attend to, in the order of `levels`."""
        texts = iter(text)
        return [[next(texts) for _ in level.attentions] for level in self.levels]

    def encode(
        self,
        hidden: Float[Array, "b h w c"],
        embedding: Float[Array, "b e"],
        texts: Sequence[TextSources],
        transform: Transform,
        levels: int | None = None,
        steering: Steering = UNSTEERED,
    ) -> list[Float[Array, "b _ _ _"]]:
        """The way down.

        Args:
            hidden: (B, h, w, channels[0]), `conv_in` of the latents, or what stands in for it.
            embedding: (B, embedding_dim), `embed_timesteps` plus `embed_added`.
            texts: of each level and each of its transformers, what it attends to.
            transform: runs the transformers.
            levels: how many are gone through, and the change of size behind the last not; None for all.
            steering: what else reads or changes the features.

        Returns:
            `hidden` and what each ResNet block (with its transformer) and each change of size gives: what the way up
            takes, of which the last goes on to the next level or the middle.
        """
        levels = len(self.down_blocks) if levels is None else levels
        found = [hidden]
        for number, level in enumerate(list(self.down_blocks)[:levels]):
            with jax.named_scope(f"down_blocks.{number}"):
                for i, resnet in enumerate(level.resnets):
                    hidden = run_block(resnet, found[-1], embedding)
                    if level.attentions:
                        hidden = transform(level.attentions[i], hidden, texts[number][i])
                    found.append(steering.down(len(found), found[-1], hidden))
                if level.resample is not None and number + 1 < levels:
                    found.append(steering.down(len(found), found[-1], level.resample(found[-1])))
        return found

    def go_through_middle(
        self,
        hidden: Float[Array, "b h w c"],
        embedding: Float[Array, "b e"],
        text: TextSource,
        transform: Transform,
        steering: Steering = UNSTEERED,
    ) -> Float[Array, "b h w c"]:
        """The middle block: (B, h, w, channels[-1]) at the coarsest level -> the same; arguments as of `encode`."""
        with jax.named_scope("mid_block"):
            before, after = self.mid_block.resnets
            found = run_block(before, hidden, embedding)
            found = transform(self.mid_block.attentions[0], found, text)
            return steering.middle(hidden, run_block(after, found, embedding))


def make_resnet(config: UNetConfig, in_channels: int, out_channels: int, make: Layers) -> ResnetBlock:
    """A ResNet block of the UNet."""
    return ResnetBlock(
        in_channels,
        out_channels,
        embedding_dim=config.embedding_dim,
        groups=config.norm_groups,
        epsilon=1e-5,
        make=make,
    )


def make_transformers(config: UNetConfig, level: int, count: int, depth: int, make: Layers) -> list[SpatialTransformer]:
    """A level's transformers; none for a depth of 0."""
    dim, heads, groups = config.channels[level], config.heads[level], config.norm_groups
    return [
        SpatialTransformer(dim, config.context_dim, heads, depth, groups=groups, make=make)
        for _ in range(count if depth else 0)
    ]
