"""How a result was made: what it says of itself, and what of it makes it again."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from faithdiff_jax import __version__
from faithdiff_jax.config import to_dict
from faithdiff_jax.files.captions import Caption
from faithdiff_jax.inference.options import RestoreOptions


@dataclasses.dataclass(frozen=True)
class Making:
    """How all results of a run are made.

    Attributes:
        options: but for the seed, of which a run may have several.
        model: SHA-256 of the model.
        loras: LoRA files and their weights.
        dtype: that was asked for, "auto" too.
        quantized: the 8-bit format of kernels, if any.
        frames: over how many frames on either side colours are smoothed; None where pictures are no frames.
    """

    options: RestoreOptions
    model: str
    loras: Mapping[str, float]
    dtype: str = "auto"
    quantized: str | None = None
    frames: int | None = None

    def described(self, seed: int) -> dict[str, Any]:
        """As plain data, which says how to make the result again."""
        options = to_dict(self.options.replace(seed=seed))
        weights = {"model": self.model, "loras": dict(self.loras), "dtype": self.dtype, "quantized": self.quantized}
        frames = {} if self.frames is None else {"frames": self.frames}
        return {"version": __version__, **weights, **frames, "options": options}

    def text(self, seed: int, caption: Caption) -> str:
        """What a picture says of itself: nothing that differs from run to run, such as a time."""
        return json.dumps({**self.described(seed), "caption": caption})
