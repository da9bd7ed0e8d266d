"""The architecture of a whole model, and the presets that are published."""

import dataclasses

from faithdiff_jax.diffusion.schedule import ScheduleConfig
from faithdiff_jax.models.alignment import STEERING, AlignmentConfig
from faithdiff_jax.models.clip import TextEncoderConfig
from faithdiff_jax.models.lq_encoder import LQ_FEATURES, feature_channels
from faithdiff_jax.models.unet_config import UNetConfig
from faithdiff_jax.models.vae import EncoderConfig, VAEConfig

DECODER_OUTPUTS = ("picture", "difference")
CLIP_L = TextEncoderConfig()
CLIP_BIGG = TextEncoderConfig(
    width=1280, layers=32, heads=20, mlp_width=5120, activation="gelu", projection=1280, end_token=49407
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaithDiffConfig:
    """The architecture of a whole model; the defaults are the published SDXL model's."""

    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    lq_encoder: EncoderConfig | None = None
    """The LQ encoder's sizes; None stands for those of the VAE's encoder, and becomes them."""
    lq_features: str = "penultimate"
    """Where the LQ encoder ends: "penultimate", before the VAE encoder's last norm and convolution; or "last". Or
    "hint" for ControlNet's own encoder, whose sizes `lq_encoder` then is: channels, and as out_channels the width that
    it embeds pictures at."""
    decoder_output: str = "picture"
    """What the VAE's decoder makes of restored latents: "picture", as published; or "difference", to be added to the
    enlarged LQ picture."""
    text_encoders: tuple[TextEncoderConfig, ...] = (CLIP_L, CLIP_BIGG)
    schedule: ScheduleConfig = ScheduleConfig()

    def __post_init__(self) -> None:
        if self.lq_encoder is None:
            object.__setattr__(self, "lq_encoder", self.vae.encoder)
        if self.lq_features not in LQ_FEATURES:
            raise ValueError(f"lq_features is {self.lq_features!r}: must be one of {', '.join(LQ_FEATURES)}")
        if self.decoder_output not in DECODER_OUTPUTS:
            raise ValueError(f"decoder_output is {self.decoder_output!r}: must be one of {', '.join(DECODER_OUTPUTS)}")
        if self.lq_encoder_config.image_channels != self.vae.image_channels:
            raise ValueError(
                f"lq_encoder.image_channels is {self.lq_encoder_config.image_channels}: must equal "
                f"vae.image_channels, {self.vae.image_channels}"
            )
        if self.lq_encoder_config.factor != self.vae.factor:
            raise ValueError(
                f"lq_encoder.channels has {len(self.lq_encoder_config.channels)} levels: must be "
                f"{len(self.vae.channels)}, as vae.channels, for features of the latents' size"
            )
        if self.lq_features == "hint":
            self._check_hint()
        latent = self.vae.latent_channels
        if (self.unet.in_channels, self.unet.out_channels) != (latent, latent):
            raise ValueError(
                f"unet.in_channels is {self.unet.in_channels} and unet.out_channels {self.unet.out_channels}: "
                f"must equal vae.latent_channels, {latent}"
            )
        if not self.text_encoders:
            raise ValueError("text_encoders is empty: at least one is needed")
        width = sum(encoder.width for encoder in self.text_encoders)
        if self.unet.context_dim != width:
            raise ValueError(f"unet.context_dim is {self.unet.context_dim}: must be the text encoders' sum, {width}")
        last = self.text_encoders[-1]
        pooled = last.projection or last.width
        if self.unet.pooled_dim not in (None, pooled):
            raise ValueError(f"unet.pooled_dim is {self.unet.pooled_dim}: must be the last encoder's, {pooled}")

    @property
    def lq_encoder_config(self) -> EncoderConfig:
        """The LQ encoder's sizes."""
        return self.lq_encoder or self.vae.encoder

    @property
    def feature_channels(self) -> int:
        """Channels of the LQ features."""
        return feature_channels(self.lq_encoder_config, self.lq_features)

    @property
    def channels_to_embed(self) -> int | None:
        """Channels of the LQ features that the alignment module embeds; None if their encoder does ("hint")."""
        return None if self.lq_features == "hint" else self.feature_channels

    def _check_hint(self) -> None:
        if not self.alignment.steers:
            raise ValueError(
                f"lq_features is 'hint': goes with alignment.kind {' or '.join(STEERING)}, not {self.alignment.kind!r}"
            )
        channels = self.alignment.xs.channels if self.alignment.kind == "controlnet_xs" else self.unet.channels
        width = channels[0]
        if self.lq_encoder_config.out_channels != width:
            raise ValueError(
                f"lq_encoder.out_channels is {self.lq_encoder_config.out_channels}: must be {width}, the width at "
                "which pictures are embedded, for lq_features 'hint'"
            )
