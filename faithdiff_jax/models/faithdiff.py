"""FaithDiff assembled: LQ features -> aligner -> UNet."""

import jax
import jax.numpy as jnp
from flax import nnx

from faithdiff_jax.models.alignment import AlignmentConfig, make_alignment
from faithdiff_jax.models.unet import TextKeysValues, UNet, UNetConfig
from faithdiff_jax.models.vae import EncoderConfig, feature_channels, make_lq_encoder


class Denoiser(nnx.Module):
    """The UNet with the aligner at its head: the part of FaithDiff that runs at every step."""

    def __init__(
        self,
        unet: UNetConfig,
        alignment: AlignmentConfig,
        feature_channels: int,
        *,
        rngs: nnx.Rngs,
        dtype=None,
        param_dtype=jnp.float32,
    ):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.unet = UNet(unet, **options)
        self.alignment = make_alignment(alignment, feature_channels, unet.channels[0], **options)

    def denoise(
        self,
        latents: jax.Array,
        embedding: jax.Array,
        condition: jax.Array,
        text: TextKeysValues,
        *,
        group: int | None = None,
    ) -> jax.Array:
        """Predict the noise from what was prepared once an image.

        Args:
            latents: (B, h, w, c), divided by sqrt(sigma^2 + 1).
            embedding: (k * B, embedding_dim), `unet.embed_timesteps` plus `unet.embed_added`. k texts (guidance has
                two: without and with the caption) share one latent, so the aligner runs once for them all.
            condition: (B, h, w, unet.channels[0]), `alignment.embed` of the LQ features.
            text: `unet.project_text` of (k * B, M, context_dim).
            group: see `Alignment`.

        Returns:
            (k * B, h, w, c).
        """
        hidden = self.alignment(self.unet.conv_in(latents), condition, group=group)
        texts = embedding.shape[0] // latents.shape[0]
        return self.unet.from_hidden(jnp.tile(hidden, (texts, 1, 1, 1)), embedding, text)

    def __call__(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        features: jax.Array,
        context: jax.Array,
        pooled: jax.Array | None = None,
        time_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Predict the noise from scratch, one text a latent; shapes as in `UNet.__call__`, features (B, h, w, F)."""
        embedding = self.unet.embed_timesteps(timesteps) + self.unet.embed_added(pooled, time_ids)
        return self.denoise(latents, embedding, self.alignment.embed(features), self.unet.project_text(context))


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
        dtype=None,
        param_dtype=jnp.float32,
    ):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.lq_encoder = make_lq_encoder(lq_encoder, lq_features, **options)
        self.denoiser = Denoiser(unet, alignment, feature_channels(lq_encoder, lq_features), **options)

    def __call__(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        lq_images: jax.Array,
        context: jax.Array,
        pooled: jax.Array | None = None,
        time_ids: jax.Array | None = None,
    ) -> jax.Array:
        """(B, h, w, c) latents and (B, H, W, 3) LQ images in [-1, 1] -> predicted noise (B, h, w, c)."""
        return self.denoiser(latents, timesteps, self.lq_encoder(lq_images), context, pooled, time_ids)
