"""A tiny random model in the published layout, written by diffusers and transformers themselves."""

import dataclasses
import functools
import json
from pathlib import Path

import diffusers
import published_sd21
import torch
import transformers
from diffusers.models.autoencoders.vae import Encoder
from tiny import TOKENIZER_VOCAB_SIZE, write_tokenizer
from torch import nn
from torch_aligner import TorchAligner

from benchmarks import published_sdxl

END_TOKEN = TOKENIZER_VOCAB_SIZE - 1
VAE_CHANNELS = (8, 16, 32, 32)
GROUPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedModels:
    """Where the files are, and the torch modules whose weights they hold, in eval mode."""

    sdxl: Path
    vae_folder: Path
    faithdiff: Path
    unet: nn.Module
    """The UNet in `faithdiff`; the one in `sdxl/unet` is `base_unet`, with other numbers."""
    base_unet: nn.Module
    lq_encoder: nn.Module
    """(B, 3, H, W) -> (B, 32, H/8, W/8): diffusers' encoder without its last norm and convolution."""
    aligner: TorchAligner
    vae: nn.Module
    """The VAE in `vae_folder`; `sdxl/vae` holds `base_vae`."""
    base_vae: nn.Module
    text_encoders: tuple[nn.Module, ...]

    def faithdiff_state(self) -> dict[str, torch.Tensor]:
        """The state dict of `faithdiff`."""
        lq_encoder = {f"denoise_encoder.{name}": tensor for name, tensor in self.lq_encoder.state_dict().items()}
        return {**lq_encoder, **self.aligner.state_dict(), **self.unet.state_dict()}

    def predict_noise(self, latents, timesteps, features, context, pooled=None, time_ids=None) -> torch.Tensor:
        """The published forward pass, NCHW: the aligner's result stands in for that of the UNet's first convolution."""
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
        hook = self.unet.conv_in.register_forward_hook(lambda module, args, hidden: self.aligner(hidden, features))
        try:
            with torch.no_grad():
                return self.unet(latents, timesteps, context, added_cond_kwargs=added).sample
        finally:
            hook.remove()


def write_published(
    folder: Path,
    *,
    seed: int = 0,
    sd21: bool = False,
    prediction: str = "epsilon",
    levels: int = 4,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    shard: str = "10GB",
    safe: bool = True,
) -> PublishedModels:
    """Write `sdxl/`, `vae/` (files at its root) and `FaithDiff.bin` under `folder`.

    `sd21` gives one text encoder, a UNet of `levels` levels and no added embedding; with `prediction` "v_prediction" it
    is as the model for 768 pixels, and else as the one for 512. `variant`, `shard` (largest file) and `safe`
    (safetensors, not `.bin`) go to save_pretrained. Every parameter is random, norms and zero-initialised
    layers included.
    """
    torch.manual_seed(seed)
    sdxl, vae_folder, faithdiff = folder / "sdxl", folder / "vae", folder / "FaithDiff.bin"
    text_encoders = text_encoder(16, 2), text_encoder(24, 3, projection=20)
    if sd21:
        text_encoders = (text_encoder(16, 2, activation="gelu"),)
    width = sum(encoder.config.hidden_size for encoder in text_encoders)
    make_unet = functools.partial(unet_sd21, levels=levels) if sd21 else unet_sdxl
    models = PublishedModels(
        sdxl=sdxl,
        vae_folder=vae_folder,
        faithdiff=faithdiff,
        unet=make_unet(width),
        base_unet=make_unet(width),
        lq_encoder=lq_encoder(),
        aligner=TorchAligner(VAE_CHANNELS[-1], 16),
        vae=vae(),
        base_vae=vae(),
        text_encoders=text_encoders,
    )
    for module in (*vars(models).values(), *text_encoders):
        if isinstance(module, nn.Module):
            randomise(module)
            nn.Module.to(module, dtype).eval()

    options = {"variant": variant, "max_shard_size": shard}
    models.base_unet.save_pretrained(sdxl / "unet", **options, safe_serialization=safe)
    models.base_vae.save_pretrained(sdxl / "vae", **options, safe_serialization=safe)
    models.vae.save_pretrained(vae_folder, **options, safe_serialization=safe)
    for i, encoder in enumerate(text_encoders):
        suffix = f"_{i + 1}" * (i > 0)
        target = sdxl / f"text_encoder{suffix}"
        encoder.save_pretrained(target, **options)
        if not safe:  # transformers no longer writes .bin files, but published folders have them
            for file in target.glob("*.safetensors*"):
                file.unlink()
            torch.save(encoder.state_dict(), target / "pytorch_model.bin")
        padding = {"pad_in_map": "!"} if sd21 else {"pad_token": "!"} if i else {}
        write_tokenizer(sdxl / f"tokenizer{suffix}", **padding)
    write_scheduler(sdxl / "scheduler", (published_sd21.scheduler(prediction) if sd21 else published_sdxl.SCHEDULER))
    torch.save(models.faithdiff_state(), faithdiff)
    return models


def unet_sdxl(context_dim: int) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 3],
        attention_head_dim=[1, 2, 4],
        cross_attention_dim=context_dim,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
        norm_num_groups=GROUPS,
        use_linear_projection=True,
    )


def unet_sd21(context_dim: int, levels: int = 4) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16, 32, 32)[:levels],
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        attention_head_dim=[1, 2, 4, 4][:levels],
        cross_attention_dim=context_dim,
        norm_num_groups=GROUPS,
        use_linear_projection=True,
    )


def vae(channels: tuple[int, ...] = VAE_CHANNELS, *, layers: int = 1) -> nn.Module:
    levels = len(channels)
    return diffusers.AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=layers,
        latent_channels=4,
        norm_num_groups=GROUPS,
        scaling_factor=0.13025,
    )


def lq_encoder() -> nn.Module:
    encoder = Encoder(
        out_channels=4,
        down_block_types=("DownEncoderBlock2D",) * len(VAE_CHANNELS),
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        norm_num_groups=GROUPS,
        double_z=True,
    )
    encoder.conv_norm_out = encoder.conv_act = encoder.conv_out = nn.Identity()
    return encoder


def text_encoder(width: int, layers: int, *, projection: int | None = None, activation: str | None = None) -> nn.Module:
    """CLIP-L without `projection`, bigG with it: activations and the legacy end token 2 as published."""
    config = transformers.CLIPTextConfig(
        vocab_size=TOKENIZER_VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=activation or ("gelu" if projection else "quick_gelu"),
        projection_dim=projection or width,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def write_scheduler(folder: Path, settings: dict) -> None:
    folder.mkdir(parents=True)
    (folder / "scheduler_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def randomise(module: nn.Module) -> None:
    """Make every parameter random and keep activations near one; zero-initialised layers and norms get values too."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape)
            if parameter.ndim == 1:
                is_scale = name.endswith("weight")
                parameter.copy_(0.1 * values + float(is_scale))
            else:
                parameter.copy_(values * parameter[0].numel() ** -0.5)
