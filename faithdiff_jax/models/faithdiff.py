"""FaithDiff assembled: LQ features -> aligner -> UNet. In baselines a steering network has the aligner's place."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Real

from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.attribution import Words
from faithdiff_jax.models.conditioning import make_alignment
from faithdiff_jax.models.lq_encoder import feature_channels, make_lq_encoder
from faithdiff_jax.models.reuse import NOTHING, Evaluated, Reuse, TextKeysValues, TextSources
from faithdiff_jax.models.steering import Steerer
from faithdiff_jax.models.unet import UNet
from faithdiff_jax.models.unet_config import UNetConfig
from faithdiff_jax.models.vae import EncoderConfig


class Denoiser(nnx.Module):
    """The UNet with the aligner at its head, or a network that steers it: what runs at every step."""

    def __init__(
        self,
        unet: UNetConfig,
        alignment: AlignmentConfig,
        feature_channels: int | None,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.unet = UNet(unet, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.alignment = make_alignment(
            alignment, unet, feature_channels, rngs=rngs, dtype=dtype, param_dtype=param_dtype
        )

    @property
    def embedding_dim(self) -> int:
        """Width of what `embed_timesteps` and `embed_added` give."""
        own = self.alignment.embedding_dim if isinstance(self.alignment, Steerer) else 0
        return self.unet.config.embedding_dim + own

    def embed_timesteps(
        self, timesteps: Real[Array, "b"], guidance: Real[Array, "b"] | None = None
    ) -> Float[Array, "b e"]:
        """(B,) timesteps in 0..999 -> (B, embedding_dim), for the UNet and what steers it; see `UNet`."""
        of_unet = self.unet.embed_timesteps(timesteps, guidance)
        if not isinstance(self.alignment, Steerer):
            return of_unet
        return self.alignment.embed_timesteps(timesteps, of_unet)

    def embed_added(
        self, pooled: Float[Array, "b p"] | None, time_ids: Real[Array, "b 6"] | None
    ) -> Float[Array, "_ e"]:
        """(B, pooled_dim), (B, 6) -> (B, embedding_dim), or (1, ...) zeros for a UNet without added embedding."""
        of_unet = self.unet.embed_added(pooled, time_ids)
        if not isinstance(self.alignment, Steerer):
            return of_unet
        return self.alignment.embed_added(pooled, time_ids, of_unet)

    def project_text(self, context: Float[Array, "b m d"]) -> TextKeysValues:
        """(B, M, context_dim) -> keys and values for every transformer, the UNet's first."""
        of_unet = self.unet.project_text(context)
        return of_unet + self.alignment.project_text(context) if isinstance(self.alignment, Steerer) else of_unet

    def denoise(
        self,
        latents: Float[Array, "b h w c"],
        embedding: Float[Array, "kb e"],
        condition: Float[Array, "b h w d"],
        text: TextKeysValues,
        *,
        group: int | None = None,
    ) -> Float[Array, "kb h w o"]:
        """Predict the noise from what was prepared once per image.

        Args:
            latents: (B, h, w, c), divided by sqrt(sigma^2 + 1).
            embedding: (k * B, embedding_dim), `embed_timesteps` plus `embed_added`. k texts (guidance has two: without
                and with the caption) share one latent, so the aligner runs once for them all.
            condition: (B, h, w, unet.channels[0]), `alignment.embed` of the LQ features.
            text: `project_text` of (k * B, M, context_dim).
            group: see `Alignment`.

        Returns:
            (k * B, h, w, c).
        """
        return self.evaluate(latents, embedding, condition, text, group=group).noise

    def evaluate(
        self,
        latents: Float[Array, "b h w c"],
        embedding: Float[Array, "kb e"],
        condition: Float[Array, "b h w d"],
        text: TextSources,
        words: Words | None = None,
        reuse: Reuse = NOTHING,
        *,
        group: int | None = None,
    ) -> Evaluated:
        """`denoise`, the maps (n, h, w, W) of the words (n, M, W) in the last n texts, and more: `UNet.evaluate`."""
        hidden = self.unet.conv_in(latents)
        texts = embedding.shape[0] // latents.shape[0]
        if not isinstance(self.alignment, Steerer):
            with jax.named_scope("aligner"):
                hidden = self.alignment(hidden, condition, group=group)
            return self.unet.evaluate(jnp.tile(hidden, (texts, 1, 1, 1)), embedding, text, words, reuse)
        if reuse != NOTHING:
            raise ValueError("a UNet that is steered takes nothing over from other evaluations")
        transformers = self.unet.transformers
        hidden, steering = self.alignment.steer(
            latents, jnp.tile(hidden, (texts, 1, 1, 1)), condition, embedding, text[transformers:]
        )
        of_unet = embedding[:, : self.unet.config.embedding_dim]
        return self.unet.evaluate(hidden, of_unet, text[:transformers], words, steering=steering)

    def __call__(
        self,
        latents: Float[Array, "b h w c"],
        timesteps: Real[Array, "b"],
        features: Float[Array, "b h w f"],
        context: Float[Array, "b m d"],
        pooled: Float[Array, "b p"] | None = None,
        time_ids: Real[Array, "b 6"] | None = None,
        guidance: Real[Array, "b"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """Predict the noise from scratch, one text per latent; shapes as in `UNet.__call__`, features (B, h, w, F).

        `guidance` is that of `UNet.embed_timesteps`.
        """
        embedding = self.embed_timesteps(timesteps, guidance) + self.embed_added(pooled, time_ids)
        return self.denoise(latents, embedding, self.alignment.embed(features), self.project_text(context))


class FaithDiffModel(nnx.Module):
    """What FaithDiff trains and publishes: LQ encoder, aligner and UNet."""

    def __init__(
        self,
        unet: UNetConfig,
        alignment: AlignmentConfig,
        lq_encoder: EncoderConfig,
        lq_features: str = "penultimate",
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        channels = None if lq_features == "hint" else feature_channels(lq_encoder, lq_features)
        self.lq_encoder = make_lq_encoder(lq_encoder, lq_features, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.denoiser = Denoiser(unet, alignment, channels, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    def __call__(
        self,
        latents: Float[Array, "b h w c"],
        timesteps: Real[Array, "b"],
        lq_images: Float[Array, "b H W i"],
        context: Float[Array, "b m d"],
        pooled: Float[Array, "b p"] | None = None,
        time_ids: Real[Array, "b 6"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """(B, h, w, c) latents and (B, H, W, 3) LQ images in [-1, 1] -> predicted noise (B, h, w, c)."""
        return self.denoiser(latents, timesteps, self.lq_encoder(lq_images), context, pooled, time_ids)
