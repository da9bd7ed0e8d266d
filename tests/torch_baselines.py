"""What the paper compares FaithDiff with, in PyTorch: diffusers' modules, all parameters random; oracles for ours."""

import dataclasses

import torch
from diffusers import ControlNetModel, ControlNetXSAdapter, UNetControlNetXSModel
from published import randomise
from torch import nn
from torch_training import TorchModel
from training_case import VAE_CHANNELS

from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.controlnet_xs import ControlNetXSConfig
from faithdiff_jax.models.vae import EncoderConfig

HINT_CHANNELS = (4, 6, 8, 12)
TRAINED_HINT = HINT_CHANNELS[: len(VAE_CHANNELS)]
# As wide as there are groups of two channels: a norm of single channels would leave the biases before it no effect.
XS = ControlNetXSConfig(channels=(16, 24), heads=(1, 2), time_embedding_mix=0.95)


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


class Controlled(TorchModel):
    """The tiny model of training steps with a network of diffusers in the place of LQ encoder and aligner."""

    def steer(self, control: nn.Module, alignment: AlignmentConfig, width: int) -> None:
        """Take the network, with random parameters; `width` is that at which it embeds pictures."""
        self.config = dataclasses.replace(
            self.config,
            alignment=alignment,
            lq_features="hint",
            lq_encoder=EncoderConfig(channels=TRAINED_HINT, out_channels=width, norm_groups=1),
        )
        self.control = control
        randomise(self.control)
        self.control.double().requires_grad_(False)

    def published(self) -> dict[str, dict[str, nn.Parameter]]:
        parts = super().published()
        named = dict(self.control.named_parameters())
        parts["lq_encoder"] = {name: value for name, value in named.items() if name.startswith("controlnet_cond")}
        parts["alignment"] = {name: value for name, value in named.items() if name not in parts["lq_encoder"]}
        return parts


class TrainedControlNet(Controlled):
    """With a ControlNet."""

    def __init__(self):
        super().__init__((16, 32))
        control = ControlNetModel.from_unet(self.unet, conditioning_embedding_out_channels=TRAINED_HINT)
        self.steer(control, AlignmentConfig(kind="controlnet"), 16)

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


class TrainedControlNetXS(Controlled):
    """With a ControlNet-XS."""

    def __init__(self):
        super().__init__((16, 32), resnets=2)
        self.steer(adapter(self.unet), AlignmentConfig(kind="controlnet_xs", xs=XS), XS.channels[0])
        self.fused = fused(self.unet, self.control)

    def predict(self, noisy, timesteps, lq, given, group):
        return self.fused(noisy, timesteps, controlnet_cond=(lq + 1) / 2, **given).sample


def adapter(unet: nn.Module) -> ControlNetXSAdapter:
    """A ControlNet-XS of the sizes XS for a UNet."""
    return ControlNetXSAdapter.from_unet(
        unet,
        block_out_channels=list(XS.channels),
        num_attention_heads=list(XS.heads),
        learn_time_embedding=True,
        time_embedding_mix=XS.time_embedding_mix,
        conditioning_embedding_out_channels=TRAINED_HINT,
    )


def fused(unet: nn.Module, control: ControlNetXSAdapter) -> UNetControlNetXSModel:
    """diffusers' joint model of the two, made of their own modules, not of copies.

    The copies that `from_unet` makes have norms of other epsilons than the UNet's own, and maybe of other groups than
    the adapter's.
    """
    model = UNetControlNetXSModel.from_unet(unet, control)
    for name in ("conv_in", "time_embedding", "add_embedding", "conv_norm_out", "conv_out"):
        setattr(model, f"base_{name}", getattr(unet, name))
    model.controlnet_cond_embedding, model.ctrl_conv_in = control.controlnet_cond_embedding, control.conv_in
    model.control_to_base_for_conv_in = control.control_to_base_for_conv_in
    model.ctrl_time_embedding = control.time_embedding
    for block, base, own in zip(model.down_blocks, unet.down_blocks, control.down_blocks, strict=True):
        block.base_resnets, block.ctrl_resnets = base.resnets, own.resnets
        block.base_to_ctrl, block.ctrl_to_base = own.base_to_ctrl, own.ctrl_to_base
        if hasattr(base, "attentions"):
            block.base_attentions, block.ctrl_attentions = base.attentions, own.attentions
        if base.downsamplers is not None:
            block.base_downsamplers, block.ctrl_downsamplers = base.downsamplers[0], own.downsamplers
    model.mid_block.base_midblock, model.mid_block.ctrl_midblock = unet.mid_block, control.mid_block.midblock
    model.mid_block.base_to_ctrl = control.mid_block.base_to_ctrl
    model.mid_block.ctrl_to_base = control.mid_block.ctrl_to_base
    for block, base, own in zip(model.up_blocks, unet.up_blocks, control.up_connections, strict=True):
        block.resnets, block.ctrl_to_base = base.resnets, own.ctrl_to_base
        if hasattr(base, "attentions"):
            block.attentions = base.attentions
        if base.upsamplers is not None:
            block.upsamplers = base.upsamplers[0]
    return model
