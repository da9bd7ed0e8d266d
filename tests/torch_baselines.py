"""What the paper compares FaithDiff with, in PyTorch: diffusers' modules, all parameters random; oracles for ours."""

import dataclasses

import torch
from diffusers import ControlNetModel, ControlNetXSAdapter, UNetControlNetXSModel
from diffusers.models.attention_processor import Attention
from published import randomise
from torch import nn
from torch_training import TorchModel
from training_case import GROUPS, VAE_CHANNELS

from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.controlnet_xs import ControlNetXSConfig
from faithdiff_jax.models.vae import EncoderConfig
from faithdiff_jax.weights import rules
from faithdiff_jax.weights.keymap import CONV, LINEAR, LINEAR_WITHOUT_BIAS, NORM, Rule

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
        self.steer(adapter(self.unet, XS), AlignmentConfig(kind="controlnet_xs", xs=XS), XS.channels[0])
        self.fused = fused(self.unet, self.control)

    def predict(self, noisy, timesteps, lq, given, group):
        return self.fused(noisy, timesteps, controlnet_cond=(lq + 1) / 2, **given).sample


class ZeroSFT(nn.Module):
    """SUPIR's transform, written from what it computes; names as published."""

    def __init__(self, control: int, kept: int, hidden: int):
        super().__init__()
        self.param_free_norm = nn.GroupNorm(GROUPS, hidden + kept)
        self.mlp_shared = nn.Sequential(nn.Conv2d(control, 128, 3, padding=1), nn.SiLU())
        self.zero_mul = nn.Conv2d(128, hidden + kept, 3, padding=1)
        self.zero_add = nn.Conv2d(128, hidden + kept, 3, padding=1)
        self.zero_conv = nn.Conv2d(control, kept, 1)

    def forward(self, control, kept, *hidden):
        features = torch.cat([*hidden, kept + self.zero_conv(control)], dim=1)
        shared = self.mlp_shared(control)
        return self.param_free_norm(features) * (1 + self.zero_mul(shared)) + self.zero_add(shared)


class ZeroCrossAttn(nn.Module):
    """SUPIR's attention to another network's features; names as published."""

    def __init__(self, control: int, hidden: int, heads: int):
        super().__init__()
        self.attn = Attention(hidden, control, heads=heads, dim_head=hidden // heads)
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, hidden), nn.GroupNorm(GROUPS, control)

    def forward(self, control, hidden):
        tokens, keys = (x.flatten(2).transpose(1, 2) for x in (self.norm1(hidden), self.norm2(control)))
        return hidden + self.attn(tokens, keys).transpose(1, 2).reshape(hidden.shape)


class TrainedSFT(Controlled):
    """With SUPIR's transforms by a copy of the UNet's encoder half, which LQ features are put into."""

    def __init__(self):
        super().__init__((16, 32))
        self.config = dataclasses.replace(self.config, alignment=AlignmentConfig(kind="sft"))
        copy = ControlNetModel.from_unet(self.unet)
        del copy.controlnet_cond_embedding, copy.controlnet_down_blocks, copy.controlnet_mid_block
        # Kept on the way down are 16 (conv_in), 16, 16 (change of size) and 32 channels.
        sizes = [(32, 32, 32), (16, 16, 32), (16, 16, 32), (16, 16, 16)]
        self.control = nn.ModuleDict(
            {
                "copy": copy,
                "hint": nn.Conv2d(VAE_CHANNELS[-1], 16, 3, padding=1),
                "middle": ZeroSFT(32, 32, 0),
                "transforms": nn.ModuleList(ZeroSFT(*channels) for channels in sizes),
                "attentions": nn.ModuleList([ZeroCrossAttn(16, 32, 2)]),
            }
        )
        randomise(self.control)
        self.control.double().requires_grad_(False)

    def rules(self, part: str) -> list[Rule]:
        if part != "alignment":
            return super().rules(part)
        transform = [Rule("param_free_norm", "norm", NORM), Rule("mlp_shared.0", "mlp_shared", CONV)]
        transform += [Rule(name, name, CONV) for name in ("zero_mul", "zero_add", "zero_conv")]
        attention = [Rule(name, name, NORM) for name in ("norm1", "norm2")]
        attention += [Rule(f"attn.{name}", f"attn.{name}", LINEAR_WITHOUT_BIAS) for name in ("to_q", "to_k", "to_v")]
        attention += [Rule("attn.to_out.0", "attn.to_out", LINEAR)]
        return [
            *(rule.under("copy.") for rule in rules.CONTROLNET),
            Rule("hint", "hint", CONV),
            *(rule.under("middle.", "middle.") for rule in transform),
            *(rule.under("transforms.{n}.", "transforms.{n}.") for rule in transform),
            *(rule.under("attentions.{n}.", "attentions.{n}.") for rule in attention),
        ]

    def published(self) -> dict[str, dict[str, nn.Parameter]]:
        return TorchModel.published(self) | {"alignment": dict(self.control.named_parameters())}

    def predict(self, noisy, timesteps, lq, given, group):
        control, unet, context = self.control, self.unet, given["encoder_hidden_states"]
        hint = control["hint"](self.lq_encoder(lq))
        *features, of_middle = encode(control["copy"], noisy, timesteps, given, hint)
        *kept, hidden = encode(unet, noisy, timesteps, given)
        embedding = embed(unet, noisy, timesteps, given)
        hidden = control["middle"](of_middle, hidden)
        transforms, attentions = iter(control["transforms"]), iter(control["attentions"])
        for block in unet.up_blocks:
            has_attention = hasattr(block, "attentions")
            for i, resnet in enumerate(block.resnets):
                last = features.pop()
                hidden = resnet(next(transforms)(last, kept.pop(), hidden), embedding)
                if has_attention:
                    (hidden,) = block.attentions[i](hidden, encoder_hidden_states=context, return_dict=False)
            if block.upsamplers is not None:
                hidden = next(attentions)(last, hidden) if has_attention else hidden
                hidden = block.upsamplers[0](hidden, kept[-1].shape[2:])
        return unet.conv_out(nn.functional.silu(unet.conv_norm_out(hidden)))


def embed(model: nn.Module, noisy, timesteps, given) -> torch.Tensor:
    """The embedding that a UNet or its copy makes of timesteps, pooled text and time ids."""
    added = given["added_cond_kwargs"]
    ids = model.add_time_proj(added["time_ids"].flatten()).reshape(len(timesteps), -1).to(noisy.dtype)
    times = model.time_embedding(model.time_proj(timesteps).to(noisy.dtype))
    return times + model.add_embedding(torch.cat([added["text_embeds"], ids], dim=-1))


def encode(model: nn.Module, noisy, timesteps, given, hint=0) -> list[torch.Tensor]:
    """What a UNet, or its copy with a hint, keeps on its way down, and its middle."""
    context, embedding = given["encoder_hidden_states"], embed(model, noisy, timesteps, given)
    hidden = model.conv_in(noisy) + hint
    kept = [hidden]
    for block in model.down_blocks:
        text = {"encoder_hidden_states": context} if hasattr(block, "attentions") else {}
        hidden, of_block = block(hidden, embedding, **text)
        kept += of_block
    return [*kept, model.mid_block(hidden, embedding, encoder_hidden_states=context)]


def adapter(unet: nn.Module, xs: ControlNetXSConfig) -> ControlNetXSAdapter:
    """A ControlNet-XS for a UNet."""
    return ControlNetXSAdapter.from_unet(
        unet,
        block_out_channels=list(xs.channels),
        num_attention_heads=list(xs.heads),
        learn_time_embedding=True,
        time_embedding_mix=xs.time_embedding_mix,
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
