"""What one evaluation of the UNet may take over from an earlier one, and what it leaves for later ones.

DeepCache (Ma et al. 2024, "DeepCache: Accelerating Diffusion Models for Free") takes over what the deep levels gave to
the finest ones; T-GATE (Zhang et al. 2024, "Cross-Attention Makes Inference Cumbersome in Text-to-Image Diffusion
Models") takes over what every attention to the text gave: there, attended features stand in the place of the text's
keys and values.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from faithdiff_jax.models.attribution import Maps

KeysValues = tuple[Float[Array, "*layers b m heads d"], Float[Array, "*layers b m heads d"]]
"""Of one attention, or of every block of a stack."""
Attended = Float[Array, "*layers b n c"]
"""What attention to the text gave to each pixel: of one block, or of every block of a stack."""
TextKeysValues = list[tuple[Float[Array, "_ _ m _ _"], Float[Array, "_ _ m _ _"]]]
"""Of every transformer of a network, in the order in which it meets them; each (depth, B, M, heads, dim / heads)."""
TextSource = KeysValues | Attended
"""What a block attends to, or what it takes over instead."""
TextSources = Sequence[tuple[Float[Array, "_ _ m _ _"], Float[Array, "_ _ m _ _"]] | Float[Array, "_ _ _ _"]]
"""Of every transformer of a UNet, in the order in which it meets them."""


@dataclasses.dataclass(frozen=True)
class Reuse:
    """What is taken over and what is kept.

    Attributes:
        levels: the finest levels, which are always evaluated; 0 for all, and nothing to keep of the deep ones.
        deep: (B, h, w, C), what the deep levels gave to the finest ones at an earlier evaluation, to leave the deep
            levels out; None to evaluate and keep it.
        keep_attended: whether to keep what each attention to the text gives.
    """

    levels: int = 0
    deep: Any = None
    keep_attended: bool = False


class Evaluated(NamedTuple):
    """What one evaluation gives.

    Attributes:
        noise: (B, h, w, out_channels), what the UNet predicts.
        maps: (n, h, w, W) of words, see `attribution`; None if nobody asks.
        deep: (B, h, w, C), what the deep levels gave to the finest ones; None unless `Reuse.levels`.
        attended: of every transformer, what attention to the text gave; empty unless `Reuse.keep_attended`.
    """

    noise: Float[Array, "b h w o"]
    maps: Maps | None = None
    deep: Float[Array, "b h w c"] | None = None
    attended: list[Array] = []  # noqa: RUF012 - never written to


NOTHING = Reuse()
