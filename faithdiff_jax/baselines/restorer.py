"""One way to call whatever restores a picture, so that methods can be measured side by side.

Restorer: name, scale, restore(picture, caption) -> picture
Bicubic, FaithDiffRestorer here; RRDBNet (Real-ESRGAN, BSRGAN, BSRNet) in `super_resolution`
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from faithdiff_jax.files.images import target_size

if TYPE_CHECKING:
    from faithdiff_jax.inference.options import RestoreOptions
    from faithdiff_jax.inference.pipeline import FaithDiff


class Restorer(Protocol):
    """Anything that restores one picture at a time.

    Attributes:
        name: for tables and files.
        scale: how many times larger a picture becomes on each side.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def scale(self) -> float: ...  # noqa: D102

    def restore(self, image: UInt8[np.ndarray, "h w 3"], caption: str) -> UInt8[np.ndarray, "H W 3"]:
        """Restore one picture; methods that read no text ignore the caption.

        Args:
            image: (h, w, 3), of any size.
            caption: what the picture shows, "" for nothing.

        Returns:
            (round(h * scale), round(w * scale), 3).
        """


@dataclass(frozen=True)
class Bicubic:
    """Plain enlargement, as Pillow's bicubic resize does it: what every method must beat."""

    scale: float
    name: str = "bicubic"

    def restore(self, image: UInt8[np.ndarray, "h w 3"], caption: str = "") -> UInt8[np.ndarray, "H W 3"]:
        """See `Restorer`."""
        height, width = target_size(image.shape[0], image.shape[1], self.scale)
        return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class FaithDiffRestorer:
    """A loaded FaithDiff with the options that it restores with; None for the model's defaults."""

    model: "FaithDiff"
    options: "RestoreOptions | None" = None
    name: str = "faithdiff"

    @property
    def scale(self) -> float:
        """See `Restorer`."""
        return (self.options or self.model.defaults).scale

    def restore(self, image: UInt8[np.ndarray, "h w 3"], caption: str = "") -> UInt8[np.ndarray, "H W 3"]:
        """See `Restorer`."""
        return self.model.restore(image, caption, self.options)
