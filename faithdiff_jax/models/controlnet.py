"""ControlNet: a copy of the UNet's encoder half, whose features are added to the UNet's on the way up.

    conv_in(latents) + condition -> copy of the encoder half -> zero-initialised 1x1 convolutions -> + skips, middle

Source: Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models", as in diffusers.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Real

from faithdiff_jax.models.encoder_half import EncoderHalf
from faithdiff_jax.models.layers import Layers
from faithdiff_jax.models.reuse import TextKeysValues, TextSource, TextSources
from faithdiff_jax.models.steering import Steerer, Steering
from faithdiff_jax.models.transformer import SpatialTransformer
from faithdiff_jax.models.unet_config import UNetConfig, skip_channels


class EncoderCopy(Steerer):
    """A copy of the UNet's encoder half that sees LQ features as well as the latents."""

    def __init__(self, config: UNetConfig, feature_channels: int | None, *, make: Layers):
        self.config = config
        self.encoder = EncoderHalf(dataclasses.replace(config, guidance_dim=None), make=make)
        super().__init__(feature_channels, config.channels[0], make=make)

    @property
    def embedding_dim(self) -> int:
        """Width of the copy's own embedding."""
        return self.config.embedding_dim

    def embed_timesteps(self, timesteps: Real[Array, "b"], of_unet: Float[Array, "b e"]) -> Float[Array, "b e2"]:
        """The UNet's embedding (B, E) and that of the copy: (B, 2 E)."""
        return jnp.concatenate([of_unet, self.encoder.embed_timesteps(timesteps)], axis=-1)

    def embed_added(
        self, pooled: Float[Array, "b p"] | None, time_ids: Real[Array, "b 6"] | None, of_unet: Float[Array, "_ e"]
    ) -> Float[Array, "_ e2"]:
        """The same of pooled text and time ids."""
        return jnp.concatenate([of_unet, self.encoder.embed_added(pooled, time_ids)], axis=-1)

    def project_text(self, context: Float[Array, "b m d"]) -> TextKeysValues:
        """(B, M, context_dim) -> keys and values for each of the copy's transformers."""
        return self.encoder.project_text(context)

    def encode(
        self,
        latents: Float[Array, "b h w z"],
        condition: Float[Array, "b h w c"],
        embedding: Float[Array, "kb e"],
        text: TextSources,
    ) -> list[Float[Array, "kb _ _ _"]]:
        """What the copy has at each place that the UNet keeps for its way up, and behind the middle; as `steer`."""
        hidden = self.encoder.conv_in(latents) + condition
        hidden = jnp.tile(hidden, (embedding.shape[0] // latents.shape[0], 1, 1, 1))
        embedding = embedding[:, self.config.embedding_dim :].astype(hidden.dtype)
        texts = self.encoder.of_levels(text)

        def transform(transformer: SpatialTransformer, hidden: Array, text: TextSource) -> Array:
            return transformer(hidden, text)

        found = self.encoder.encode(hidden, embedding, texts, transform)
        return [*found, self.encoder.go_through_middle(found[-1], embedding, texts[-1][0], transform)]


class ControlNet(EncoderCopy):
    """The copy's features, through convolutions that start at zero, added to the UNet's."""

    def __init__(
        self,
        config: UNetConfig,
        feature_channels: int | None,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        make = Layers(rngs, dtype, param_dtype)
        super().__init__(config, feature_channels, make=make)
        self.controlnet_down_blocks = nnx.List(
            [
                make.conv1x1(width, width, zeros=True)
                for width in skip_channels(config.channels, config.resnets_per_level)
            ]
        )
        self.controlnet_mid_block = make.conv1x1(config.channels[-1], config.channels[-1], zeros=True)

    def residuals(
        self,
        latents: Float[Array, "b h w z"],
        condition: Float[Array, "b h w c"],
        embedding: Float[Array, "kb e"],
        text: TextSources,
    ) -> list[Float[Array, "kb _ _ _"]]:
        """What is added to what the UNet keeps for its way up, in its order, and to the middle; as `steer`."""
        found = self.encode(latents, condition, embedding, text)
        convolutions = [*self.controlnet_down_blocks, self.controlnet_mid_block]
        return [convolve(features) for convolve, features in zip(convolutions, found, strict=True)]

    def steer(
        self,
        latents: Float[Array, "b h w z"],
        hidden: Float[Array, "kb h w c"],
        condition: Float[Array, "b h w d"],
        embedding: Float[Array, "kb e"],
        text: TextSources,
    ) -> tuple[Float[Array, "kb h w c"], Steering]:
        """Begin one evaluation: `hidden` stays as it is, the residuals come later."""
        with jax.named_scope("controlnet"):
            return hidden, _Residuals(self.residuals(latents, condition, embedding, text))


class _Residuals(Steering):
    """Adds to the middle, and to what was kept on the way down when it is taken on the way up."""

    def __init__(self, residuals: Sequence[Array]):
        *self.of_skips, self.of_middle = residuals

    def middle(self, before: Float[Array, "b h w c"], after: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return after + self.of_middle

    def join(
        self, number: int, hidden: Float[Array, "b h w c"], skip: Float[Array, "b h w s"]
    ) -> Float[Array, "b h w cs"]:
        return super().join(number, hidden, skip + self.of_skips[number])
