"""What the paper compares FaithDiff with, in PyTorch: diffusers' modules, all parameters random; oracles for ours."""

import dataclasses

import torch
from diffusers import ControlNetModel
from published import randomise
from torch import nn
from torch_training import TorchModel
from training_case import VAE_CHANNELS

from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.vae import EncoderConfig

HINT_CHANNELS = (4, 6, 8, 12)


def controlnet(unet: nn.Module, seed: int = 3) -> ControlNetModel:
    """A ControlNet of a UNet's sizes with every parameter random, zero-initialised layers included."""
    torch.manual_seed(seed)
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT_CHANNELS)
    randomise(model)
    return model.eval()


def controlled(unet: nn.Module, control: nn.Module, latents, timesteps, context, added, pictures) -> torch.Tensor:
    """The UNet's prediction with the ControlNet's residuals, NCHW; pictures (B, 3, H, W) in [0, 1]."""
    inputs = {"encoder_hidden_states": context, "added_cond_kwargs": added}
    with torch.no_grad():
        residuals, middle = control(latents, timesteps, controlnet_cond=pictures, return_dict=False, **inputs)
        return unet(
            latents,
            timesteps,
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=middle,
            **inputs,
        ).sample


class TrainedControlNet(TorchModel):
    """The tiny model of training steps with a ControlNet in the place of LQ encoder and aligner."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__(widths)
        hint = HINT_CHANNELS[: len(VAE_CHANNELS)]
        self.config = dataclasses.replace(
            self.config,
            alignment=AlignmentConfig(kind="controlnet"),
            lq_features="hint",
            lq_encoder=EncoderConfig(channels=hint, out_channels=widths[0], norm_groups=1),
        )
        self.control = ControlNetModel.from_unet(self.unet, conditioning_embedding_out_channels=hint)
        randomise(self.control)
        self.control.double().requires_grad_(False)

    def published(self) -> dict[str, dict[str, nn.Parameter]]:
        parts = super().published()
        named = dict(self.control.named_parameters())
        parts["lq_encoder"] = {name: value for name, value in named.items() if name.startswith("controlnet_cond")}
        parts["alignment"] = {name: value for name, value in named.items() if name not in parts["lq_encoder"]}
        return parts

    def predict(self, noisy, timesteps, lq, given, group):
        pictures = (lq + 1) / 2
        residuals, middle = self.control(noisy, timesteps, controlnet_cond=pictures, return_dict=False, **given)
        return self.unet(
            noisy,
            timesteps,
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=middle,
            **given,
        ).sample
