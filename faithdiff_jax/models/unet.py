"""The latent diffusion UNet of SDXL and SD 2.1, in pieces that a sampler can call apart.

    latents --conv_in--> hidden ----------------------\
    timesteps, pooled text, time ids --> embedding ----> from_hidden --> predicted noise
    context --project_text--> keys and values --------/

What stays the same from step to step (text keys and values, the added embedding) is thus computed once, and
FaithDiff's aligner sits between `conv_in` and `from_hidden`. Module names follow the published tensors.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Real

from faithdiff_jax.models.attribution import Maps, Words, mean_map
from faithdiff_jax.models.blocks import Upsample
from faithdiff_jax.models.encoder_half import EncoderHalf, UNetLevel, make_resnet, make_transformers
from faithdiff_jax.models.layers import Layers, run_block
from faithdiff_jax.models.reuse import NOTHING, Attended, Evaluated, Reuse, TextKeysValues, TextSource, TextSources
from faithdiff_jax.models.steering import UNSTEERED, Steering
from faithdiff_jax.models.transformer import SpatialTransformer
from faithdiff_jax.models.unet_config import UNetConfig, skip_channels


class UNet(EncoderHalf):
    """Predicts the noise in a latent from the noise level and a text. Source: Podell et al. 2023 (SDXL)."""

    def __init__(
        self,
        config: UNetConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        make = Layers(rngs, dtype, param_dtype)
        super().__init__(config, make=make)
        widths = config.channels
        up, incoming, skips = [], widths[-1], skip_channels(config.channels, config.resnets_per_level)
        for level in reversed(range(len(widths))):
            resnets = []
            for _ in range(config.resnets_per_level + 1):
                resnets.append(make_resnet(config, incoming + skips.pop(), widths[level], make))
                incoming = widths[level]
            attentions = make_transformers(config, level, len(resnets), config.transformer_depth[level], make)
            upsample = Upsample(widths[level], make=make) if level > 0 else None
            up.append(UNetLevel(resnets, attentions, upsample))
        self.up_blocks = nnx.List(up)

        self.conv_norm_out = make.group_norm(widths[0], config.norm_groups, epsilon=1e-5)
        self.conv_out = make.conv3x3(widths[0], config.out_channels)

    @property
    def levels(self) -> list[UNetLevel]:
        """In the order in which data goes through them: down, the middle, up."""
        return [*super().levels, *self.up_blocks]

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
        steering: Steering = UNSTEERED,
    ) -> Evaluated:
        """`from_hidden`, which pixels look at which words (see `attribution`), and what later evaluations may reuse.

        Args:
            hidden: as for `from_hidden`, like `embedding` and `text`.
            embedding: (B, embedding_dim).
            text: what `project_text` returned, or `Evaluated.attended` of an earlier evaluation.
            words: (n, M, W), the weight of each text token in each word, for the last n of the batch; None for none.
            reuse: what is left out because an earlier evaluation has it.
            steering: what else reads or changes the features.

        Returns:
            The predicted noise (B, h, w, out_channels); maps (n, h, w, W), the mean over all heads of the transformers
            on the way down and up, or None: then the program is that of `from_hidden`.
        """
        texts = self.of_levels(text)
        embedding = embedding.astype(hidden.dtype)
        _, height, width, _ = hidden.shape
        found: list[Maps] = []  # of each transformer outside the middle
        attended: list[Attended] = []

        def transform(
            transformer: SpatialTransformer, hidden: Array, text: TextSource, words: Words | None = words
        ) -> Array:
            hidden, maps, kept = transformer.evaluate(hidden, text, words, keep_attended=reuse.keep_attended)
            found.extend(() if maps is None else [maps])
            attended.extend(() if kept is None else [kept])
            return hidden

        def unattributed(transformer: SpatialTransformer, hidden: Array, text: TextSource) -> Array:
            return transform(transformer, hidden, text, None)

        levels = len(self.down_blocks)
        evaluated = levels if reuse.deep is None else reuse.levels
        skips = self.encode(hidden, embedding, texts, transform, evaluated, steering)
        hidden = skips[-1]
        if evaluated == levels:
            hidden = self.go_through_middle(hidden, embedding, texts[levels][0], unattributed, steering)

        deep = reuse.deep
        for number, level in list(enumerate(self.up_blocks))[levels - evaluated :]:
            with jax.named_scope(f"up_blocks.{number}"):
                if reuse.levels == levels - number:  # from here on the finest levels
                    hidden = deep = hidden if deep is None else deep.astype(hidden.dtype)
                for i, resnet in enumerate(level.resnets):
                    skip = skips.pop()
                    hidden = run_block(resnet, steering.join(len(skips), hidden, skip), embedding)
                    if level.attentions:
                        hidden = transform(level.attentions[i], hidden, texts[levels + 1 + number][i])
                if level.resample is not None:
                    hidden = level.resample(steering.enlarge(len(skips), hidden), skips[-1].shape[1:3])
        noise = self.conv_out(nnx.silu(self.conv_norm_out(hidden)))
        maps = None if words is None else mean_map(found, self.config.heads_attributed, (height, width))
        return Evaluated(noise, maps, deep, attended)

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
