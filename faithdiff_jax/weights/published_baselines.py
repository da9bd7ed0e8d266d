"""Published networks that steer a frozen UNet -> our configs: their sizes from their tensors, the rest from a file.

As diffusers writes them: `ControlNetModel` and `ControlNetXSAdapter`.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from faithdiff_jax.errors import InputError
from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.controlnet_xs import ControlNetXSConfig
from faithdiff_jax.models.sizes import LARGEST_WIDTH, MOST_LEVELS
from faithdiff_jax.models.unet_config import UNetConfig
from faithdiff_jax.models.vae import EncoderConfig
from faithdiff_jax.weights.published_configs import Settings

Shapes = Mapping[str, tuple[int, ...]]

# Key -> (default, values we support), beside what the tensors say.
CONTROLNET_SUPPORTED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "_class_name": ("ControlNetModel", ("ControlNetModel",)),
    "conditioning_channels": (3, (3,)),
    "controlnet_conditioning_channel_order": ("rgb", ("rgb",)),
    "global_pool_conditions": (False, (False,)),
}
XS_SUPPORTED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "_class_name": ("ControlNetXSAdapter", ("ControlNetXSAdapter",)),
    "conditioning_channels": (3, (3,)),
    "conditioning_channel_order": ("rgb", ("rgb",)),
    "learn_time_embedding": (False, (False, True)),
    "use_linear_projection": (True, (True,)),
}
PUBLISHED_HINT = (16, 32, 96, 256)
_HINT_WEIGHT = re.compile(r"controlnet_cond_embedding\.(conv_in|conv_out|blocks\.([0-9]{1,2}))\.weight")
_OF_XS = "control_to_base_for_conv_in.weight"
_XS_LEVEL = "down_blocks.{}.ctrl_to_base.0.weight"


def steering_config(shapes: Shapes, config: pathlib.Path, unet: UNetConfig) -> tuple[AlignmentConfig, EncoderConfig]:
    """The alignment module and the encoder of pictures that a published file holds: a ControlNet or a ControlNet-XS.

    Args:
        shapes: published name -> shape, of every tensor of the file.
        config: the `config.json` beside it. A ControlNet needs none, but what it says must be what we compute.
        unet: the UNet that is steered.

    Raises:
        InputError: what we do not compute; a ControlNet-XS without a `config.json`, or for another UNet.
    """
    if _OF_XS in shapes:
        alignment = _controlnet_xs(shapes, config, unet)
        return alignment, hint_config(shapes, alignment.xs.channels[0])
    if config.is_file():
        file = Settings(config)
        file.hold_to(CONTROLNET_SUPPORTED)
        file.raise_faults()
    return AlignmentConfig(kind="controlnet"), hint_config(shapes, unet.channels[0])


def hint_config(shapes: Shapes, width: int) -> EncoderConfig:
    """The sizes of a network's own encoder of pictures from the shapes of its tensors, by published name.

    Where they do not say, these are the published sizes, with `width` channels at the end, which the tensors then do
    not have.
    """
    widths = {
        match[2] or match[1]: shape[0]
        for name, shape in shapes.items()
        if (match := _HINT_WEIGHT.fullmatch(name)) and len(shape) == 4
    }
    odd = sorted(int(key) for key in widths if key.isdigit() and int(key) % 2)
    sizes = [widths[key] for key in ("conv_in", *map(str, odd)) if key in widths]
    channels = tuple(sizes) if 1 < len(sizes) <= MOST_LEVELS else PUBLISHED_HINT
    return EncoderConfig(channels=channels, out_channels=widths.get("conv_out", width), norm_groups=1)


def _controlnet_xs(shapes: Shapes, config: pathlib.Path, unet: UNetConfig) -> AlignmentConfig:
    if not config.is_file():
        raise InputError(f"{config}: no such file, which says how many attention heads a ControlNet-XS has")
    file, levels = Settings(config), len(unet.channels)
    file.hold_to(XS_SUPPORTED | {"max_norm_num_groups": (32, (unet.norm_groups,))})
    heads = file.per_level("num_attention_heads", 4, levels, LARGEST_WIDTH)
    mix = file.number("time_embedding_mix", 1.0, 0, 1) if file.get("learn_time_embedding", False) else None
    of_levels = [shapes.get(_XS_LEVEL.format(level), ()) for level in range(levels)]
    channels = tuple(shape[1] if len(shape) == 4 else 1 for shape in of_levels)
    return file.build(
        lambda: AlignmentConfig(
            kind="controlnet_xs", xs=ControlNetXSConfig(channels=channels, heads=heads, time_embedding_mix=mix)
        )
    )
