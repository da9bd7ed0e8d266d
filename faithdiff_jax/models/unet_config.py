"""The sizes of the UNet."""

import dataclasses
import itertools
from collections.abc import Sequence

from faithdiff_jax.models.sizes import LARGEST_WIDTH, MOST_LAYERS, check_levels, check_sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes of the UNet; the defaults are SDXL's. Per-level tuples go from the finest level to the coarsest."""

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280)
    resnets_per_level: int = 2
    transformer_depth: tuple[int, ...] = (0, 2, 10)
    """Transformer blocks after each ResNet block; 0 leaves attention out of a level."""
    mid_transformer_depth: int = 10
    heads: tuple[int, ...] = (5, 10, 20)
    context_dim: int = 2048
    pooled_dim: int | None = 1280
    """Width of the pooled text in the added embedding (SDXL); None for models without one (SD 2.1)."""
    time_id_dim: int = 256
    """Width of the sinusoidal embedding of each of the six time ids."""
    guidance_dim: int | None = None
    """Width of the sinusoidal embedding of the guidance weight, for a UNet that guidance was distilled into; None for
    one that predicts without guidance."""
    norm_groups: int = 32

    def __post_init__(self) -> None:
        check_levels(self.channels)
        check_sizes(self, 1, LARGEST_WIDTH, "in_channels", "out_channels", "channels", "context_dim", "pooled_dim")
        check_sizes(self, 1, LARGEST_WIDTH, "time_id_dim", "norm_groups", "heads", "guidance_dim")
        check_sizes(self, 1, MOST_LAYERS, "resnets_per_level", "mid_transformer_depth")
        check_sizes(self, 0, MOST_LAYERS, "transformer_depth")
        levels = len(self.channels)
        for name in ("transformer_depth", "heads"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: needs one number per level, {levels} as in channels"
                )
        for width, heads in zip(self.channels, self.heads, strict=True):
            if width % self.norm_groups:
                raise ValueError(f"channels has {width}: must be a multiple of norm_groups, {self.norm_groups}")
            if heads < 1 or width % heads:
                raise ValueError(f"heads has {heads}: must divide its level's channels, {width}")

    @property
    def embedding_dim(self) -> int:
        """Width of the time embedding: four times the finest level."""
        return 4 * self.channels[0]

    @property
    def heads_attributed(self) -> int:
        """Heads that attend to the text on the way down and up, over all layers: those that maps are a mean over."""
        transformers = 2 * self.resnets_per_level + 1
        return sum(
            transformers * depth * heads for depth, heads in zip(self.transformer_depth, self.heads, strict=True)
        )

    @property
    def smallest_side(self) -> int:
        """The smallest latent height or width: it leaves one pixel at the coarsest level."""
        return 1 << (len(self.channels) - 1)


def skip_channels(channels: Sequence[int], resnets_per_level: int) -> list[int]:
    """Channels of what a way down keeps for the way up: the first convolution's result, then each block's.

    Args:
        channels: of each level, from the finest to the coarsest.
        resnets_per_level: each level but the coarsest ends with a change of size, which is kept as well.
    """
    last = len(channels) - 1
    below = ([width] * (resnets_per_level + (level < last)) for level, width in enumerate(channels))
    return [channels[0], *itertools.chain(*below)]
