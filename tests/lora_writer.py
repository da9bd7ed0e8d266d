"""LoRA files as others write them, for the tiny published UNet (one ResNet block a level) and its text encoders."""

import safetensors.torch
import torch

RANK = 3
# Published modules of the tiny UNet (one ResNet block a level), and what the original code calls them.
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.2.resnets.0.conv_shortcut": "input_blocks.5.0.skip_connection",
    "down_blocks.1.resnets.0.time_emb_proj": "input_blocks.3.0.emb_layers.1",
    "down_blocks.1.attentions.0.proj_in": "input_blocks.3.1.proj_in",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.3.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0": (
        "input_blocks.3.1.transformer_blocks.0.attn1.to_out.0"
    ),
    "mid_block.attentions.0.transformer_blocks.2.ff.net.0.proj": "middle_block.1.transformer_blocks.2.ff.net.0.proj",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.attentions.1.transformer_blocks.1.attn2.to_v": "output_blocks.3.1.transformer_blocks.1.attn2.to_v",
    "conv_out": "out.2",
}


def peft_names(pairs, alpha=None):
    tensors = {}
    for (part, module), (down, up) in pairs.items():
        tensors[f"{part}.{module}.lora_A.weight"] = down
        tensors[f"{part}.{module}.lora_B.weight"] = up
    return tensors


def old_names(pairs, alpha=None):
    tensors = {}
    for (part, module), (down, up) in pairs.items():
        if part == "unet" and ".attn" in module:
            head, _, last = module.removesuffix(".0").rpartition(".")
            name = f"unet.{head}.processor.{last}_lora"
        else:
            name = f"{part}.{module}.lora"
        tensors[f"{name}.down.weight"] = down
        tensors[f"{name}.up.weight"] = up
    return tensors


def kohya_names(pairs, alpha, original=False):
    tensors = {}
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    for (part, module), (down, up) in pairs.items():
        inner = UNET[module] if original and part == "unet" else module
        name = prefixes[part] + inner.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


def kohya_original_names(pairs, alpha):
    return kohya_names(pairs, alpha, original=True)


def write(tmp_path, tensors, metadata=None):
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path
