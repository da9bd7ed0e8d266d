"""The latent diffusion UNet of SDXL and SD 2.1, in pieces that a sampler can call apart.

    latents --conv_in--> hidden ----------------------\
    timesteps, pooled text, time ids --> embedding ----> from_hidden --> predicted noise
    context --project_text--> keys and values --------/

What stays the same from step to step (text keys and values, the added embedding) is thus computed once, and
FaithDiff's aligner sits between `conv_in` and `from_hidden`. Module names follow the published tensors.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Real

from faithdiff_jax.models.attribution import Maps, Words, mean_map
from faithdiff_jax.models.blocks import Downsample, ResnetBlock, Upsample
from faithdiff_jax.models.layers import Layers, run_block
from faithdiff_jax.models.reuse import NOTHING, Attended, Evaluated, Reuse, TextSource, TextSources
from faithdiff_jax.models.sizes import LARGEST_WIDTH, MOST_LAYERS, check_levels, check_sizes
from faithdiff_jax.models.transformer import SpatialTransformer

TextKeysValues = list[tuple[Float[Array, "_ _ m _ _"], Float[Array, "_ _ m _ _"]]]
"""Of every transformer of a UNet, in the order in which it meets them; each (depth, B, M, heads, dim / heads)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes of the UNet; the defaults are SDXL's. Per-level tuples go from the finest level to the coarsest."""

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280)
    resnets_per_level: int = 2
    transformer_depth: tuple[int, ...] = (0, 2, 10)
    """Transformer blocks after each ResNet block; 0 leaves attention out of a level."""
    mid_transformer_depth: int = 10
    heads: tuple[int, ...] = (5, 10, 20)
    context_dim: int = 2048
    pooled_dim: int | None = 1280
    """Width of the pooled text in the added embedding (SDXL); None for models without one (SD 2.1)."""
    time_id_dim: int = 256
    """Width of the sinusoidal embedding of each of the six time ids."""
    guidance_dim: int | None = None
    """Width of the sinusoidal embedding of the guidance weight, for a UNet that guidance was distilled into; None for
    one that predicts without guidance."""
    norm_groups: int = 32

    def __post_init__(self) -> None:
        check_levels(self.channels)
        check_sizes(self, 1, LARGEST_WIDTH, "in_channels", "out_channels", "channels", "context_dim", "pooled_dim")
        check_sizes(self, 1, LARGEST_WIDTH, "time_id_dim", "norm_groups", "heads", "guidance_dim")
        check_sizes(self, 1, MOST_LAYERS, "resnets_per_level", "mid_transformer_depth")
        check_sizes(self, 0, MOST_LAYERS, "transformer_depth")
        levels = len(self.channels)
        for name in ("transformer_depth", "heads"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: needs one number per level, {levels} as in channels"
                )
        for width, heads in zip(self.channels, self.heads, strict=True):
            if width % self.norm_groups:
                raise ValueError(f"channels has {width}: must be a multiple of norm_groups, {self.norm_groups}")
            if heads < 1 or width % heads:
                raise ValueError(f"heads has {heads}: must divide its level's channels, {width}")

    @property
    def embedding_dim(self) -> int:
        """Width of the time embedding: four times the finest level."""
        return 4 * self.channels[0]

    @property
    def heads_attributed(self) -> int:
        """Heads that attend to the text on the way down and up, over all layers: those that maps are a mean over."""
        transformers = 2 * self.resnets_per_level + 1
        return sum(
            transformers * depth * heads for depth, heads in zip(self.transformer_depth, self.heads, strict=True)
        )

    @property
    def smallest_side(self) -> int:
        """The smallest latent height or width: it leaves one pixel at the coarsest level."""
        return 1 << (len(self.channels) - 1)


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


class UNet(nnx.Module):
    """Predicts the noise in a latent from the noise level and a text. Source: Podell et al. 2023 (SDXL)."""

    def __init__(
        self,
        config: UNetConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config = config
        make = Layers(rngs, dtype, param_dtype)
        widths, embedding_dim, groups = config.channels, config.embedding_dim, config.norm_groups

        def resnet(in_channels: int, out_channels: int) -> ResnetBlock:
            return ResnetBlock(
                in_channels, out_channels, embedding_dim=embedding_dim, groups=groups, epsilon=1e-5, make=make
            )

        def transformers(level: int, count: int, depth: int) -> list[SpatialTransformer]:
            dim, heads = widths[level], config.heads[level]
            return [
                SpatialTransformer(dim, config.context_dim, heads, depth, groups=groups, make=make)
                for _ in range(count if depth else 0)
            ]

        self.conv_in = make.conv3x3(config.in_channels, widths[0])
        self.time_embedding = EmbeddingMLP(widths[0], embedding_dim, config.guidance_dim, make=make)
        self.add_embedding = (
            EmbeddingMLP(config.pooled_dim + 6 * config.time_id_dim, embedding_dim, make=make)
            if config.pooled_dim is not None
            else None
        )

        last = len(widths) - 1
        down, skips = [], [widths[0]]
        for level, width in enumerate(widths):
            below = widths[max(level - 1, 0)]
            resnets = [resnet(below if i == 0 else width, width) for i in range(config.resnets_per_level)]
            attentions = transformers(level, len(resnets), config.transformer_depth[level])
            downsample = Downsample(width, padding=1, make=make) if level < last else None
            down.append(UNetLevel(resnets, attentions, downsample))
            skips += [width] * (len(resnets) + (level < last))
        self.down_blocks = nnx.List(down)

        self.mid_block = UNetLevel(
            [resnet(widths[-1], widths[-1]), resnet(widths[-1], widths[-1])],
            transformers(last, 1, config.mid_transformer_depth),
            None,
        )

        up, incoming = [], widths[-1]
        for level in reversed(range(len(widths))):
            resnets = []
            for _ in range(config.resnets_per_level + 1):
                resnets.append(resnet(incoming + skips.pop(), widths[level]))
                incoming = widths[level]
            attentions = transformers(level, len(resnets), config.transformer_depth[level])
            upsample = Upsample(widths[level], make=make) if level > 0 else None
            up.append(UNetLevel(resnets, attentions, upsample))
        self.up_blocks = nnx.List(up)

        self.conv_norm_out = make.group_norm(widths[0], groups, epsilon=1e-5)
        self.conv_out = make.conv3x3(widths[0], config.out_channels)

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
        """(B, M, context_dim) -> keys and values for every transformer, in the order `from_hidden` meets them."""
        levels = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [transformer.project_text(context) for level in levels for transformer in level.attentions]

    def from_hidden(
        self, hidden: Float[Array, "b h w c"], embedding: Float[Array, "b e"], text: TextKeysValues
    ) -> Float[Array, "b h w o"]:
        """Everything after the first convolution.

        Args:
            hidden: (B, h, w, channels[0]), `conv_in` of the latents, or what stands in for it.
            embedding: (B, embedding_dim), `embed_timesteps` plus `embed_added`.
            text: what `project_text` returned.

        Returns:
            (B, h, w, out_channels), the predicted noise.
        """
        return self.evaluate(hidden, embedding, text).noise

    def evaluate(
        self,
        hidden: Float[Array, "b h w c"],
        embedding: Float[Array, "b e"],
        text: TextSources,
        words: Words | None = None,
        reuse: Reuse = NOTHING,
    ) -> Evaluated:
        """`from_hidden`, which pixels look at which words (see `attribution`), and what later evaluations may reuse.

        Args:
            hidden: as for `from_hidden`, like `embedding` and `text`.
            embedding: (B, embedding_dim).
            text: what `project_text` returned, or `Evaluated.attended` of an earlier evaluation.
            words: (n, M, W), the weight of each text token in each word, for the last n of the batch; None for none.
            reuse: what is left out because an earlier evaluation has it.

        Returns:
            The predicted noise (B, h, w, out_channels); maps (n, h, w, W), the mean over all heads of the transformers
            on the way down and up, or None: then the program is that of `from_hidden`.
        """
        texts = self._of_levels(text)
        embedding = embedding.astype(hidden.dtype)
        _, height, width, _ = hidden.shape
        skips = [hidden]
        found: list[Maps] = []  # of each transformer outside the middle
        attended: list[Attended] = []

        def transform(transformer: SpatialTransformer, hidden: Array, text: TextSource) -> Array:
            hidden, maps, kept = transformer.evaluate(hidden, text, words, keep_attended=reuse.keep_attended)
            found.extend(() if maps is None else [maps])
            attended.extend(() if kept is None else [kept])
            return hidden

        levels = len(self.down_blocks)
        evaluated = levels if reuse.deep is None else reuse.levels
        for number, level in enumerate(list(self.down_blocks)[:evaluated]):
            with jax.named_scope(f"down_blocks.{number}"):
                for i, resnet in enumerate(level.resnets):
                    hidden = run_block(resnet, hidden, embedding)
                    if level.attentions:
                        hidden = transform(level.attentions[i], hidden, texts[number][i])
                    skips.append(hidden)
                if level.resample is not None and number + 1 < evaluated:
                    hidden = level.resample(hidden)
                    skips.append(hidden)

        if evaluated == levels:
            with jax.named_scope("mid_block"):
                before, after = self.mid_block.resnets
                hidden = run_block(before, hidden, embedding)
                transformer, source = self.mid_block.attentions[0], texts[levels][0]
                hidden, _, kept = transformer.evaluate(hidden, source, None, keep_attended=reuse.keep_attended)
                attended.extend(() if kept is None else [kept])
                hidden = run_block(after, hidden, embedding)

        deep = reuse.deep
        for number, level in list(enumerate(self.up_blocks))[levels - evaluated :]:
            with jax.named_scope(f"up_blocks.{number}"):
                if reuse.levels == levels - number:  # from here on the finest levels
                    hidden = deep = hidden if deep is None else deep.astype(hidden.dtype)
                for i, resnet in enumerate(level.resnets):
                    hidden = run_block(resnet, jnp.concatenate([hidden, skips.pop()], axis=-1), embedding)
                    if level.attentions:
                        hidden = transform(level.attentions[i], hidden, texts[levels + 1 + number][i])
                if level.resample is not None:
                    hidden = level.resample(hidden, skips[-1].shape[1:3])
        noise = self.conv_out(nnx.silu(self.conv_norm_out(hidden)))
        maps = None if words is None else mean_map(found, self.config.heads_attributed, (height, width))
        return Evaluated(noise, maps, deep, attended)

    def _of_levels(self, text: TextSources) -> list[list[TextSource]]:
        """What each level's transformers attend to: levels down, the middle, levels up."""
        texts = iter(text)
        levels = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [[next(texts) for _ in level.attentions] for level in levels]

    def __call__(
        self,
        latents: Float[Array, "b h w c"],
        timesteps: Real[Array, "b"],
        context: Float[Array, "b m d"],
        pooled: Float[Array, "b p"] | None = None,
        time_ids: Real[Array, "b 6"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """The plain UNet, without FaithDiff's aligner.

        Args:
            latents: (B, h, w, in_channels), already divided by sqrt(sigma^2 + 1).
            timesteps: (B,) in 0..999.
            context: (B, M, context_dim) text features.
            pooled: (B, pooled_dim) pooled text features, SDXL only.
            time_ids: (B, 6) original size, crop and target size in pixels, SDXL only.

        Returns:
            (B, h, w, out_channels).
        """
        embedding = self.embed_timesteps(timesteps) + self.embed_added(pooled, time_ids)
        return self.from_hidden(self.conv_in(latents), embedding, self.project_text(context))
