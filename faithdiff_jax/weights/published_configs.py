"""Published `config.json` files -> our configs. What our models do not compute is refused, not passed over.

A key that a file leaves out has the default of the library that wrote it, which is stated here beside each key.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from faithdiff_jax.diffusion.schedule import MOST_TRAIN_STEPS, PREDICTIONS, ScheduleConfig
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.reading import read_json
from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.clip import LARGEST_VOCABULARY, TextEncoderConfig
from faithdiff_jax.models.sizes import LARGEST_WIDTH, MOST_LAYERS, MOST_LEVELS
from faithdiff_jax.models.unet_config import UNetConfig
from faithdiff_jax.models.vae import EncoderConfig, VAEConfig
from faithdiff_jax.weights.safetensors_format import shown

Built = TypeVar("Built")

# Key -> (default, values we support).
UNET_SUPPORTED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "_class_name": ("UNet2DConditionModel", ("UNet2DConditionModel",)),
    "act_fn": ("silu", ("silu",)),
    "addition_embed_type": (None, (None, "text_time")),
    "attention_type": ("default", ("default",)),
    "center_input_sample": (False, (False,)),
    "class_embed_type": (None, (None,)),
    "class_embeddings_concat": (False, (False,)),
    "conv_in_kernel": (3, (3,)),
    "conv_out_kernel": (3, (3,)),
    "cross_attention_norm": (None, (None,)),
    "downsample_padding": (1, (1,)),
    "dual_cross_attention": (False, (False,)),
    "encoder_hid_dim": (None, (None,)),
    "encoder_hid_dim_type": (None, (None,)),
    "flip_sin_to_cos": (True, (True,)),
    "freq_shift": (0, (0,)),
    "mid_block_only_cross_attention": (None, (None, False)),
    "mid_block_scale_factor": (1, (1,)),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", ("UNetMidBlock2DCrossAttn",)),
    "norm_eps": (1e-5, (1e-5,)),
    "num_class_embeds": (None, (None,)),
    "only_cross_attention": (False, (False,)),
    "resnet_out_scale_factor": (1.0, (1.0,)),
    "resnet_skip_time_act": (False, (False,)),
    "resnet_time_scale_shift": ("default", ("default",)),
    "reverse_transformer_layers_per_block": (None, (None,)),
    "time_cond_proj_dim": (None, (None,)),
    "time_embedding_act_fn": (None, (None,)),
    "time_embedding_dim": (None, (None,)),
    "time_embedding_type": ("positional", ("positional",)),
    "timestep_post_act": (None, (None,)),
    "use_linear_projection": (False, (True,)),
}
VAE_SUPPORTED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "_class_name": ("AutoencoderKL", ("AutoencoderKL",)),
    "act_fn": ("silu", ("silu",)),
    "in_channels": (3, (3,)),
    "latents_mean": (None, (None,)),
    "latents_std": (None, (None,)),
    "mid_block_add_attention": (True, (True,)),
    "out_channels": (3, (3,)),
    "shift_factor": (None, (None,)),
    "use_post_quant_conv": (True, (True,)),
    "use_quant_conv": (True, (True,)),
}
TEXT_SUPPORTED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "hidden_act": ("quick_gelu", ("quick_gelu", "gelu")),
    "layer_norm_eps": (1e-5, (1e-5,)),
}
# Of how a sampler spaces its steps only "trailing" is taken over, which models of few steps are trained for; all else
# (linspace, Karras sigmas) is the sampler's that saved the file: ours is the published one.
SCHEDULE_SUPPORTED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "beta_schedule": ("linear", ("scaled_linear",)),
    "prediction_type": ("epsilon", PREDICTIONS),
    "rescale_betas_zero_snr": (False, (False,)),
    "trained_betas": (None, (None,)),
}

DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # type -> whether it has transformers
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
LEGACY_END_TOKEN = 2
MOST_TENSORS = 100_000
_LQ_RESNET = re.compile(r"denoise_encoder\.down_blocks\.([0-9]{1,2})\.resnets\.([0-9]{1,2})\.conv1\.weight")
TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")


class Settings:
    """One config file: its keys with their defaults, and every fault found in it."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.faults: list[str] = []
        data = read_json(path)
        if not isinstance(data, dict):
            raise InputError(f"{path}: holds {type(data).__name__}, an object of settings is needed")
        self._data = data

    def get(self, key: str, default: Any = None) -> Any:
        """A key's value, whatever it is."""
        return self._data.get(key, default)

    def refuse(self, key: str, value: Any, wanted: str) -> None:
        """Note a fault."""
        self.faults.append(f"{key} is {shown(json.dumps(value))}: supported is {wanted}")

    def count(self, key: str, default: int | None, most: int, *, least: int = 1) -> int:
        """A whole number in a range; a fault without which the others cannot be looked for."""
        value = self.get(key, default)
        if not _is_whole(value) or not least <= value <= most:
            self.stop(key, value, f"a whole number from {least} to {most:,}")
        return int(value)

    def number(self, key: str, default: float, least: float, most: float) -> float:
        """A number in a range."""
        value = self.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
            self.stop(key, value, f"a number from {least:g} to {most:g}")
        return float(value)

    def hold_to(self, supported: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> None:
        """Note every key whose value is not a supported one."""
        for key, (default, values) in supported.items():
            value = self.get(key, default)
            if value not in values:
                self.refuse(key, value, " or ".join(json.dumps(item) for item in values))

    def per_level(self, key: str, default: Any, levels: int, most: int) -> tuple[int, ...]:
        """A whole number from 1 to `most` for each level, of a list or of one number for all."""
        value = self.get(key, default)
        numbers = [value] * levels if _is_whole(value) else value
        if isinstance(numbers, list) and len(numbers) == levels and all(_is_whole(number) for number in numbers):
            if all(1 <= number <= most for number in numbers):
                return tuple(numbers)
            self.refuse(key, value, f"from 1 to {most:,}, as many as these weights can hold")
            return (1,) * levels
        self.refuse(key, value, f"a whole number, or a list of {levels}, one per level")
        return (1,) * levels

    def same_everywhere(self, key: str, default: Any, levels: int, most: int) -> int:
        """A whole number that must not differ between levels."""
        numbers = self.per_level(key, default, levels, most)
        if len(set(numbers)) > 1:
            self.refuse(key, numbers, "the same number for every level")
        return numbers[0]

    def blocks(self, key: str, kinds: Mapping[str, bool], default: Sequence[str], levels: int) -> list[bool]:
        """Whether each level has transformers, from the types of its blocks."""
        types = self.get(key, list(default))
        if (
            not isinstance(types, list)
            or len(types) != levels
            or not all(isinstance(kind, str) and kind in kinds for kind in types)
        ):
            self.refuse(key, types, f"{levels} of {', '.join(kinds)}")
            return [False] * levels
        return [kinds[name] for name in types]

    def channels(self, default: Sequence[int]) -> tuple[int, ...]:
        """The widths of the levels; a fault without which the others cannot be looked for."""
        value = self.get("block_out_channels", list(default))
        if (
            not isinstance(value, list)
            or not 1 <= len(value) <= MOST_LEVELS
            or not all(_is_whole(number) and 1 <= number <= LARGEST_WIDTH for number in value)
        ):
            self.stop("block_out_channels", value, "a list of whole numbers, one per level")
        return tuple(value)

    def stop(self, key: str, value: Any, wanted: str) -> NoReturn:
        """Note a fault without which the others cannot be looked for, and raise them all."""
        self.refuse(key, value, wanted)
        raise InputError(f"{self.path}: {'; '.join(self.faults)}")

    def raise_faults(self) -> None:
        """InputError for the faults noted before, if any."""
        if self.faults:
            raise InputError(f"{self.path}: {'; '.join(self.faults)}")

    def build(self, make: Callable[[], Built]) -> Built:
        """Make the config; faults noted before, and what the config itself refuses, are an InputError."""
        self.raise_faults()
        try:
            return make()
        except InputError:
            raise
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.path}: {error}") from None


def unet_config(path: pathlib.Path, tensors: int = MOST_TENSORS) -> UNetConfig:
    """`unet/config.json` of diffusers, for weights of so many `tensors`: no more layers than they can make up.

    Raises:
        InputError: a setting that is missing, of the wrong type, out of range or not supported; all of them at once.
    """
    layers = _most_layers(tensors)
    file = Settings(path)
    channels = file.channels((320, 640, 1280, 1280))
    levels = len(channels)
    file.hold_to(UNET_SUPPORTED)
    down = file.blocks("down_block_types", DOWN_BLOCKS, ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], levels)
    up = file.blocks("up_block_types", UP_BLOCKS, ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, levels)
    if not file.faults and up != down[::-1]:
        file.refuse("up_block_types", file.get("up_block_types"), "down_block_types in reverse")
    depth = file.per_level("transformer_layers_per_block", 1, levels, layers)
    # diffusers' attention_head_dim is the number of heads, unless num_attention_heads gives that.
    heads_key = "attention_head_dim" if file.get("num_attention_heads") is None else "num_attention_heads"
    heads = file.per_level(heads_key, 8, levels, LARGEST_WIDTH)
    pooled, time_id_dim = None, UNetConfig.time_id_dim
    if file.get("addition_embed_type") == "text_time":
        time_id_dim = file.count("addition_time_embed_dim", None, LARGEST_WIDTH)
        width = file.get("projection_class_embeddings_input_dim")
        if not _is_whole(width) or width <= 6 * time_id_dim:
            file.stop("projection_class_embeddings_input_dim", width, f"more than six time ids, {6 * time_id_dim}")
        pooled = width - 6 * time_id_dim
    resnets = file.same_everywhere("layers_per_block", 2, levels, layers)
    context_dim = file.same_everywhere("cross_attention_dim", 1280, levels, LARGEST_WIDTH)
    return file.build(
        lambda: UNetConfig(
            in_channels=file.count("in_channels", 4, LARGEST_WIDTH),
            out_channels=file.count("out_channels", 4, LARGEST_WIDTH),
            channels=channels,
            resnets_per_level=resnets,
            transformer_depth=tuple(count if has else 0 for count, has in zip(depth, down, strict=True)),
            mid_transformer_depth=depth[-1],
            heads=heads,
            context_dim=context_dim,
            pooled_dim=pooled,
            time_id_dim=time_id_dim,
            norm_groups=file.count("norm_num_groups", 32, LARGEST_WIDTH),
        )
    )


def vae_config(path: pathlib.Path, tensors: int = MOST_TENSORS) -> VAEConfig:
    """`vae/config.json` of diffusers, for weights of so many `tensors`; see `unet_config`."""
    file = Settings(path)
    channels = file.channels((64,))
    file.hold_to(VAE_SUPPORTED)
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        file.blocks(key, {kind: False}, [kind], len(channels))
    return file.build(
        lambda: VAEConfig(
            latent_channels=file.count("latent_channels", 4, LARGEST_WIDTH // 2),
            channels=channels,
            resnets_per_level=file.count("layers_per_block", 1, _most_layers(tensors)),
            norm_groups=file.count("norm_num_groups", 32, LARGEST_WIDTH),
            scaling_factor=file.number("scaling_factor", 0.18215, 1e-6, 1e6),
        )
    )


def text_encoder_config(path: pathlib.Path, tensors: int = MOST_TENSORS, *, output: str) -> TextEncoderConfig:
    """`text_encoder/config.json` of transformers, for weights of so many `tensors`; see `unet_config`.

    SDXL takes the "penultimate" states, SD 2.1 the "final" ones.
    """
    file = Settings(path)
    file.hold_to(TEXT_SUPPORTED)
    names = file.get("architectures") or ["CLIPTextModel"]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in TEXT_CLASSES:
        file.refuse("architectures", names, " or ".join(TEXT_CLASSES))
    vocab_size = file.count("vocab_size", 49408, LARGEST_VOCABULARY)
    end_token = file.count("eos_token_id", 49407, LARGEST_VOCABULARY, least=0)
    if end_token == LEGACY_END_TOKEN:
        # Files of before transformers 4.30 have this wrong number; their end token is the last of the vocabulary.
        end_token = vocab_size - 1
    return file.build(
        lambda: TextEncoderConfig(
            vocab_size=vocab_size,
            width=file.count("hidden_size", 512, LARGEST_WIDTH),
            layers=file.count("num_hidden_layers", 12, _most_layers(tensors)),
            heads=file.count("num_attention_heads", 8, LARGEST_WIDTH),
            mlp_width=file.count("intermediate_size", 2048, LARGEST_WIDTH),
            positions=file.count("max_position_embeddings", 77, LARGEST_WIDTH),
            activation=file.get("hidden_act", "quick_gelu"),
            projection=file.count("projection_dim", 512, LARGEST_WIDTH) if names == [TEXT_CLASSES[1]] else None,
            output=output,
            end_token=end_token,
        )
    )


def schedule_config(path: pathlib.Path) -> ScheduleConfig:
    """`scheduler/scheduler_config.json` of diffusers."""
    file = Settings(path)
    file.hold_to(SCHEDULE_SUPPORTED)
    return file.build(
        lambda: ScheduleConfig(
            train_steps=file.count("num_train_timesteps", 1000, MOST_TRAIN_STEPS),
            beta_start=file.number("beta_start", 0.0001, 0, 1),
            beta_end=file.number("beta_end", 0.02, 0, 1),
            steps_offset=file.count("steps_offset", 0, MOST_TRAIN_STEPS, least=0),
            prediction=file.get("prediction_type", "epsilon"),
            spacing="trailing" if file.get("timestep_spacing") == "trailing" else ScheduleConfig.spacing,
        )
    )


def alignment_config(names: Sequence[str]) -> AlignmentConfig:
    """The aligner's depth from FaithDiff's tensor names; heads and norm groups show in no shape: as published."""
    layers = {name.split(".")[1] for name in names if name.startswith("information_transformer_layes.")}
    return AlignmentConfig(layers=max(len(layers), 1))


def lq_encoder_config(shapes: Mapping[str, tuple[int, ...]], vae: VAEConfig) -> EncoderConfig:
    """The LQ encoder's sizes from the shapes of FaithDiff's tensors: it need not be the encoder of the VAE beside it.

    Norm groups show in no shape: they are the VAE's where those divide the widths, else the published 32.

    Args:
        shapes: published name -> shape.
        vae: the VAE; its encoder's sizes are the result where the tensors do not say what they are.
    """
    widths: dict[tuple[int, int], int] = {}
    for name, shape in shapes.items():
        if (match := _LQ_RESNET.fullmatch(name)) and len(shape) == 4:
            widths[int(match[1]), int(match[2])] = shape[0]
    levels = 1 + max((level for level, _ in widths), default=-1)
    resnets = 1 + max((resnet for _, resnet in widths), default=-1)
    if not widths or len(widths) != levels * resnets:
        return vae.encoder
    channels = tuple(widths[level, 0] for level in range(levels))
    if (channels, resnets) == (vae.channels, vae.resnets_per_level):
        return vae.encoder
    fits = all(width % vae.norm_groups == 0 for width in channels)
    return dataclasses.replace(
        vae.encoder,
        channels=channels,
        resnets_per_level=resnets,
        norm_groups=vae.norm_groups if fits else EncoderConfig.norm_groups,
    )


def _most_layers(tensors: int) -> int:
    """How many layers so many tensors can make up: each layer of any of these models has eight or more."""
    return max(1, min(MOST_LAYERS, tensors // 8))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
