"""Published `config.json` files -> our configs. What our models do not compute is refused, not passed over.

A key that a file leaves out has the default of the library that wrote it, which is stated here beside each key.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from faithdiff_jax.diffusion.schedule import PREDICTIONS, ScheduleConfig
from faithdiff_jax.errors import InputError
from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.clip import TextEncoderConfig
from faithdiff_jax.models.unet import UNetConfig
from faithdiff_jax.models.vae import VAEConfig

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
# How a sampler spaces its steps (timestep_spacing, Karras sigmas) is not the model's: ours is the published one.
SCHEDULE_SUPPORTED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "beta_schedule": ("linear", ("scaled_linear",)),
    "prediction_type": ("epsilon", PREDICTIONS),
    "rescale_betas_zero_snr": (False, (False,)),
    "trained_betas": (None, (None,)),
}

DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # type -> whether it has transformers
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
LEGACY_END_TOKEN = 2
TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")


class _Settings:
    """One config file: its keys with their defaults, and every fault found in it."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.faults: list[str] = []
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError:
            raise InputError(f"{path}: is not JSON") from None
        if not isinstance(data, dict):
            raise InputError(f"{path}: holds {type(data).__name__}, an object of settings is needed")
        self._data = data

    def get(self, key: str, default: Any = None) -> Any:
        return self._data.get(key, default)

    def refuse(self, key: str, value: Any, wanted: str) -> None:
        self.faults.append(f"{key} is {json.dumps(value)}: supported is {wanted}")

    def hold_to(self, supported: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> None:
        """Note every key whose value is not a supported one."""
        for key, (default, values) in supported.items():
            value = self.get(key, default)
            if value not in values:
                self.refuse(key, value, " or ".join(json.dumps(item) for item in values))

    def per_level(self, key: str, default: Any, levels: int) -> tuple[int, ...]:
        """A whole number for each level, of a list or of one number for all."""
        value = self.get(key, default)
        numbers = [value] * levels if _is_count(value) else value
        if isinstance(numbers, list) and len(numbers) == levels and all(_is_count(number) for number in numbers):
            return tuple(numbers)
        self.refuse(key, value, f"a whole number, or a list of {levels}, one a level")
        return (1,) * levels

    def same_everywhere(self, key: str, default: Any, levels: int) -> int:
        """A whole number that must not differ between levels."""
        numbers = self.per_level(key, default, levels)
        if len(set(numbers)) > 1:
            self.refuse(key, numbers, "the same number for every level")
        return numbers[0]

    def blocks(self, key: str, kinds: Mapping[str, bool], default: Sequence[str], levels: int) -> list[bool]:
        """Whether each level has transformers, from the types of its blocks."""
        types = self.get(key, list(default))
        if not isinstance(types, list) or len(types) != levels or not set(types) <= set(kinds):
            self.refuse(key, types, f"{levels} of {', '.join(kinds)}")
            return [False] * levels
        return [kinds[name] for name in types]

    def channels(self, default: Sequence[int]) -> tuple[int, ...]:
        value = self.get("block_out_channels", list(default))
        if not isinstance(value, list) or not value or not all(_is_count(number) for number in value):
            self.stop("block_out_channels", value, "a list of whole numbers, one a level")
        return tuple(value)

    def stop(self, key: str, value: Any, wanted: str) -> None:
        """Note a fault without which the others cannot be looked for."""
        self.refuse(key, value, wanted)
        self.raise_faults()

    def raise_faults(self) -> None:
        if self.faults:
            raise InputError(f"{self.path}: {'; '.join(self.faults)}")

    def build(self, make: Callable[[], Built]) -> Built:
        """Make the config; faults noted before, and what the config itself refuses, are an InputError."""
        self.raise_faults()
        try:
            return make()
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.path}: {error}") from None


def unet_config(path: pathlib.Path) -> UNetConfig:
    """`unet/config.json` of diffusers."""
    file = _Settings(path)
    channels = file.channels((320, 640, 1280, 1280))
    levels = len(channels)
    file.hold_to(UNET_SUPPORTED)
    down = file.blocks("down_block_types", DOWN_BLOCKS, ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], levels)
    up = file.blocks("up_block_types", UP_BLOCKS, ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, levels)
    if not file.faults and up != down[::-1]:
        file.refuse("up_block_types", file.get("up_block_types"), "down_block_types in reverse")
    depth = file.per_level("transformer_layers_per_block", 1, levels)
    # diffusers' attention_head_dim is the number of heads, unless num_attention_heads gives that.
    heads_key = "attention_head_dim" if file.get("num_attention_heads") is None else "num_attention_heads"
    heads = file.per_level(heads_key, 8, levels)
    pooled, time_id_dim = None, UNetConfig.time_id_dim
    if file.get("addition_embed_type") == "text_time":
        time_id_dim, width = file.get("addition_time_embed_dim"), file.get("projection_class_embeddings_input_dim")
        if not _is_count(time_id_dim):
            file.stop("addition_time_embed_dim", time_id_dim, "a whole number")
        if not _is_count(width) or width <= 6 * time_id_dim:
            file.stop("projection_class_embeddings_input_dim", width, f"more than six time ids, {6 * time_id_dim}")
        pooled = width - 6 * time_id_dim
    resnets = file.same_everywhere("layers_per_block", 2, levels)
    context_dim = file.same_everywhere("cross_attention_dim", 1280, levels)
    return file.build(
        lambda: UNetConfig(
            in_channels=file.get("in_channels", 4),
            out_channels=file.get("out_channels", 4),
            channels=channels,
            resnets_per_level=resnets,
            transformer_depth=tuple(count if has else 0 for count, has in zip(depth, down, strict=True)),
            mid_transformer_depth=depth[-1],
            heads=heads,
            context_dim=context_dim,
            pooled_dim=pooled,
            time_id_dim=time_id_dim,
            norm_groups=file.get("norm_num_groups", 32),
        )
    )


def vae_config(path: pathlib.Path) -> VAEConfig:
    """`vae/config.json` of diffusers."""
    file = _Settings(path)
    channels = file.channels((64,))
    file.hold_to(VAE_SUPPORTED)
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        file.blocks(key, {kind: False}, [kind], len(channels))
    return file.build(
        lambda: VAEConfig(
            latent_channels=file.get("latent_channels", 4),
            channels=channels,
            resnets_per_level=file.get("layers_per_block", 1),
            norm_groups=file.get("norm_num_groups", 32),
            scaling_factor=float(file.get("scaling_factor", 0.18215)),
        )
    )


def text_encoder_config(path: pathlib.Path, *, output: str) -> TextEncoderConfig:
    """`text_encoder/config.json` of transformers. SDXL takes the "penultimate" states, SD 2.1 the "final" ones."""
    file = _Settings(path)
    file.hold_to(TEXT_SUPPORTED)
    names = file.get("architectures") or ["CLIPTextModel"]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in TEXT_CLASSES:
        file.refuse("architectures", names, " or ".join(TEXT_CLASSES))
    vocab_size = file.get("vocab_size", 49408)
    end_token = file.get("eos_token_id", 49407)
    if end_token == LEGACY_END_TOKEN:
        # Files of before transformers 4.30 have this wrong number; their end token is the last of the vocabulary.
        end_token = vocab_size - 1
    return file.build(
        lambda: TextEncoderConfig(
            vocab_size=vocab_size,
            width=file.get("hidden_size", 512),
            layers=file.get("num_hidden_layers", 12),
            heads=file.get("num_attention_heads", 8),
            mlp_width=file.get("intermediate_size", 2048),
            positions=file.get("max_position_embeddings", 77),
            activation=file.get("hidden_act", "quick_gelu"),
            projection=file.get("projection_dim", 512) if names == [TEXT_CLASSES[1]] else None,
            output=output,
            end_token=end_token,
        )
    )


def schedule_config(path: pathlib.Path) -> ScheduleConfig:
    """`scheduler/scheduler_config.json` of diffusers."""
    file = _Settings(path)
    file.hold_to(SCHEDULE_SUPPORTED)
    return file.build(
        lambda: ScheduleConfig(
            train_steps=file.get("num_train_timesteps", 1000),
            beta_start=file.get("beta_start", 0.0001),
            beta_end=file.get("beta_end", 0.02),
            steps_offset=file.get("steps_offset", 0),
            prediction=file.get("prediction_type", "epsilon"),
        )
    )


def alignment_config(names: Sequence[str]) -> AlignmentConfig:
    """The aligner's depth from FaithDiff's tensor names; heads and norm groups show in no shape: as published."""
    layers = {name.split(".")[1] for name in names if name.startswith("information_transformer_layes.")}
    return AlignmentConfig(layers=max(len(layers), 1))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
