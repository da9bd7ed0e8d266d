"""Captions of each tile that is denoised: which part of a picture a tile shows, and captions as contexts.

picture --tile_boxes--> what each tile shows --a captioner, or a person--> captions --encode_captions--> a context each
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.captions import Box, Caption
from faithdiff_jax.files.images import target_size
from faithdiff_jax.inference.grid import latent_grid
from faithdiff_jax.inference.inputs import Text
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.models.config import FaithDiffConfig

if TYPE_CHECKING:
    from faithdiff_jax.inference.pipeline import FaithDiff


def tile_boxes(options: RestoreOptions, config: FaithDiffConfig, size: tuple[int, int]) -> list[Box]:
    """Which part of a picture each tile shows, from left to right and then down.

    What a tile has of the padding is left out; one that has little else is given half a tile of the picture.

    Args:
        options: scale, tile, overlap and multiple are read.
        config: the model's.
        size: height and width in pixels of the picture as it is given.

    Raises:
        InputError: a picture that these options do not restore, or passes, of which each has tiles of its own.
    """
    options.check_tile_captions()
    factor = config.vae.factor
    latent = [side // factor for side in options.padded_size(config, *size)]
    target = target_size(*size, options.scale)
    boxes = []
    for corner in latent_grid(latent[0], latent[1], options.tile, options.overlap):
        (top, bottom), (left, right) = (
            _span(at * factor, min(options.tile, whole) * factor, enlarged, side)
            for at, whole, enlarged, side in zip(corner, latent, target, size, strict=True)
        )
        boxes.append((left, top, right, bottom))
    return boxes


def check_caption(caption: Caption, options: RestoreOptions, config: FaithDiffConfig, size: tuple[int, int]) -> None:
    """InputError unless it is one caption, or one for each tile of a picture of that height and width."""
    if isinstance(caption, str):
        return
    boxes = tile_boxes(options, config, size)
    if len(caption) != len(boxes):
        across, down = ([f"{a}-{b}" for a, b in dict.fromkeys(box[i::2] for box in boxes)] for i in (0, 1))
        places = f"{len(across)} across (pixels {_listed(across)}) and {len(down)} down ({_listed(down)})"
        raise InputError(
            f"caption is a list of {len(caption)}: must be one text, or {len(boxes)}, one for each tile from left to "
            f"right and then down: {places}"
        )


def encode_captions(model: "FaithDiff", caption: Caption, negative: str) -> tuple[Text, Text]:
    """The caption and the negative caption of one picture; tiles that all show the same are one caption."""
    captions = [caption] if isinstance(caption, str) else list(caption)
    if len(set(captions)) == 1:
        context, pooled = model.encode_text([captions[0], negative])
        return Text.of(context[:1], pooled[:1]), Text.of(context[1:], pooled[1:])
    each = list(dict.fromkeys([negative, *captions]))
    # Two at a time, by the program that encodes one caption and the negative one.
    pairs = [model.encode_text([*each[i : i + 2], negative][:2]) for i in range(0, len(each), 2)]
    contexts, pooled_ = (np.concatenate([np.asarray(x) for x in arrays]) for arrays in zip(*pairs, strict=True))
    places = np.array([each.index(text) for text in captions])
    own = Text(context=contexts[None, places], pooled=pooled_[None, places])
    return own, Text.of(contexts[:1], pooled_[:1])


def _span(start: int, length: int, target: int, side: int) -> tuple[int, int]:
    """Where a tile of the enlarged picture begins and ends along a side of the picture itself."""
    shrink = side / target
    last = min(math.ceil((start + length) * shrink), side)
    return max(min(math.floor(start * shrink), last - math.ceil(length * shrink / 2)), 0), last


def _listed(spans: Sequence[str], most: int = 6) -> str:
    """At most so many of them."""
    return ", ".join(spans if len(spans) <= most else [*spans[: most - 1], "...", spans[-1]])
