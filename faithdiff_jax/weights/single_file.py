"""Checkpoints in one file, as the original code of SDXL and SD 2.1 and most fine-tuned models are published.

    model.diffusion_model.input_blocks.4.1.proj_in.weight -> down_blocks.1.attentions.0.proj_in.weight
    first_stage_model.decoder.up.3.block.0.conv1.weight   -> decoder.up_blocks.0.resnets.0.conv1.weight

Their tensors get diffusers' names; a file that holds these already is taken as it is. Text encoders in such a file are
in `open_clip_names`.
"""

import re
from collections.abc import Callable, Mapping

from faithdiff_jax.errors import InputError
from faithdiff_jax.weights.safetensors_format import Tensor
from faithdiff_jax.weights.tensor_files import Renamed, TensorSource

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
UNDER = ("state_dict",)
"""Where a checkpoint of torch.save keeps its tensors, beside what else a training run left in it."""

_UNET_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_MIDDLE = {"block_1": "mid_block.resnets.0", "block_2": "mid_block.resnets.1"}


def unet_module(name: str, resnets_per_level: int) -> str | None:
    """diffusers' name of a module of the UNet, or of a tensor; None for one that no UNet has.

    Args:
        name: the original one, without `model.diffusion_model.`.
        resnets_per_level: of the UNet, 2 for SDXL: blocks are numbered through over the levels.
    """
    for ours, theirs in _UNET_ENDS.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    match = re.fullmatch(r"(input_blocks|output_blocks)\.(\d+)\.(\d)\.(.+)|middle_block\.([012])\.(.+)", name)
    if match is None:
        return None
    if match[5] is not None:
        return _inside(_UNET_MIDDLE[match[5]], match[6], _UNET_RESNET)
    side, number, inner, rest = match[1], int(match[2]), match[3], match[4]
    level, block = divmod(number - (side == "input_blocks"), resnets_per_level + 1)
    down = side == "input_blocks"
    prefix = f"{'down' if down else 'up'}_blocks.{level}"
    if rest == ("op" if down else "conv") or rest.startswith("op." if down else "conv."):
        return f"{prefix}.{'down' if down else 'up'}samplers.0.conv{rest.removeprefix('op' if down else 'conv')}"
    if inner == "0":
        return _inside(f"{prefix}.resnets.{block}", rest, _UNET_RESNET)
    return f"{prefix}.attentions.{block}.{rest}" if inner == "1" else None


def vae_module(name: str, levels: int) -> str | None:
    """diffusers' name of a tensor of the VAE; None for one that no VAE has.

    Args:
        name: the original one, without `first_stage_model.`.
        levels: of the VAE, 4 for SDXL's: the original counts the decoder's from the end.
    """
    if name.startswith(("quant_conv.", "post_quant_conv.")):
        return name
    match = re.fullmatch(r"(encoder|decoder)\.(.+)", name)
    if match is None:
        return None
    side, rest = match[1], match[2]
    if rest.startswith(("conv_in.", "conv_out.")):
        return name
    if rest.startswith("norm_out."):
        return f"{side}.conv_norm_out.{rest.removeprefix('norm_out.')}"
    middle = re.fullmatch(r"mid\.(block_[12]|attn_1)\.(.+)", rest)
    if middle is not None:
        if middle[1] == "attn_1":
            return _inside(f"{side}.mid_block.attentions.0", middle[2], _VAE_ATTENTION)
        return _inside(f"{side}.{_VAE_MIDDLE[middle[1]]}", middle[2], {"nin_shortcut": "conv_shortcut"})
    block = re.fullmatch(r"(down|up)\.(\d+)\.(?:block\.(\d+)\.(.+)|(?:down|up)sample\.(conv\..+))", rest)
    if block is None:
        return None
    level = int(block[2]) if block[1] == "down" else levels - 1 - int(block[2])
    prefix = f"{side}.{block[1]}_blocks.{level}"
    if block[3] is None:
        return f"{prefix}.{block[1]}samplers.0.{block[5]}"
    return _inside(f"{prefix}.resnets.{block[3]}", block[4], {"nin_shortcut": "conv_shortcut"})


def unet_of(source: TensorSource) -> TensorSource:
    """The UNet of a file, under diffusers' names.

    Raises:
        InputError: the file has none.
    """
    names = source.shapes()
    prefix = UNET_PREFIX if any(name.startswith(UNET_PREFIX) for name in names) else ""
    if not prefix and "conv_in.weight" in names:
        return source
    if f"{prefix}input_blocks.0.0.weight" not in names:
        raise InputError(f"{source.files[0]}: holds no UNet, neither as diffusers nor as the original code names it")
    # Each level but the last ends in a downsampler: the first one's number says how many blocks a level has.
    ends = [name.removeprefix(prefix) for name in names if name.endswith(".op.weight")]
    numbers = [int(name.split(".")[1]) for name in ends if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name)]
    resnets_per_level = max(1, min(numbers, default=len(names)) - 1)
    return Renamed(source, _under(prefix, lambda name: unet_module(name, resnets_per_level)))


def vae_of(source: TensorSource) -> TensorSource:
    """The VAE of a file, under diffusers' names; the 1x1 convolutions of its attention as the linear layers they are.

    Raises:
        InputError: the file has none.
    """
    names = source.shapes()
    prefix = VAE_PREFIX if any(name.startswith(VAE_PREFIX) for name in names) else ""
    if not prefix and "encoder.down_blocks.0.resnets.0.conv1.weight" in names:
        return source
    if f"{prefix}encoder.down.0.block.0.conv1.weight" not in names:
        raise InputError(f"{source.files[0]}: holds no VAE, neither as diffusers nor as the original code names it")
    found = (re.match(rf"{re.escape(prefix)}decoder\.up\.(\d+)\.", name) for name in names)
    levels = len({match[1] for match in found if match})
    return _LinearAttention(source, _under(prefix, lambda name: vae_module(name, levels)))


class _LinearAttention(Renamed):
    """With the weights of attention (out, in, 1, 1) as (out, in)."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `TensorSource`."""
        return {name: shape[:2] if _is_1x1(name, shape) else shape for name, shape in super().shapes().items()}

    def get(self, name: str) -> Tensor:
        """See `TensorSource`."""
        array = super().get(name)
        return array[:, :, 0, 0] if _is_1x1(name, array.shape) else array


def _is_1x1(name: str, shape: tuple[int, ...]) -> bool:
    return ".attentions." in name and shape[2:] == (1, 1)


def _inside(prefix: str, rest: str, names: Mapping[str, str]) -> str:
    """`prefix` and what comes behind it, the beginning of which may have another name."""
    for ours, theirs in names.items():
        if rest == ours or rest.startswith(f"{ours}."):
            return f"{prefix}.{theirs}{rest[len(ours) :]}"
    return f"{prefix}.{rest}"


def _under(prefix: str, rename: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """Rename what has the prefix, leave out what has not; names that mean nothing stay as they are, to be refused."""

    def renamed(name: str) -> str | None:
        if not name.startswith(prefix):
            return None
        return rename(name.removeprefix(prefix)) or name

    return renamed
