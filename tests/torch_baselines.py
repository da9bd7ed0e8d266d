"""What the paper compares FaithDiff with, in PyTorch: diffusers' modules, all parameters random; oracles for ours."""

import torch
from diffusers import ControlNetModel
from published import randomise
from torch import nn

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
