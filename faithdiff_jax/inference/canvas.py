"""A picture as the networks see it: enlarged, and padded up to a size that pictures can share."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float32, Int, UInt8

from faithdiff_jax.files import images
from faithdiff_jax.files.rows import upscale_rows
from faithdiff_jax.inference.color import Tint
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.models.config import FaithDiffConfig

Places = Int[np.ndarray, " _"]


@dataclasses.dataclass(frozen=True)
class Canvas:
    """A picture to enlarge, and the heights and widths in pixels that it is restored at.

    Attributes:
        image: the picture.
        scale: how many times larger it becomes.
        target: of it enlarged, without padding.
        exact_size: of it padded to whole latent pixels, as published.
        size: of it padded to multiples of `RestoreOptions.multiple`; the same as `exact_size` without that.
        tint: the colours that the restored picture is to have, None for the picture's own.
    """

    image: UInt8[np.ndarray, "h w 3"]
    scale: float
    target: tuple[int, int]
    exact_size: tuple[int, int]
    size: tuple[int, int]
    tint: Tint | None = None

    @classmethod
    def of(
        cls,
        image: UInt8[np.ndarray, "h w 3"],
        options: RestoreOptions,
        config: FaithDiffConfig,
        tint: Tint | None = None,
    ) -> "Canvas":
        """For a picture (h, w, 3); InputError for one too large or too small, before anything is allocated."""
        height, width = image.shape[:2]
        size = options.padded_size(config, height, width)
        exact_size = options.replace(multiple=None).padded_size(config, height, width)
        target = images.target_size(height, width, options.scale)
        return cls(image, options.scale, target, exact_size, size, tint)

    @functools.cached_property
    def upscaled(self) -> UInt8[np.ndarray, "H W 3"]:
        """The picture enlarged, without padding."""
        return images.upscale(self.image, self.scale)

    def padded(self) -> Float32[np.ndarray, "1 padded_H padded_W 3"]:
        """The picture as a batch of one of `size`, in [-1, 1].

        Up to `exact_size` its last row and column are repeated, as published. From there on it is mirrored, which
        changes the picture less than more repetition would (`benchmarks/padding.py`).
        """
        rows, columns = self._places
        return images.to_float(self.upscaled[rows[:, None], columns])[None]

    def tinted(self, enlarged: Float32[np.ndarray, "*n 3"]) -> Float32[np.ndarray, "*n 3"]:
        """Pixels of the enlarged picture, in [-1, 1], in the colours that the restored one is to have."""
        return enlarged if self.tint is None else self.tint(enlarged)

    def rows(self, start: int, stop: int) -> UInt8[np.ndarray, "rows W 3"]:
        """Those rows of `upscaled`, which is not made for them."""
        return upscale_rows(self.image, self.target, start, stop)

    def padded_rows(self, start: int, stop: int) -> UInt8[np.ndarray, "rows padded_W 3"]:
        """Rows of what `padded` gives, at eight bits."""
        rows, columns = self._places
        rows = rows[start:stop]
        first = int(rows.min())
        found: np.ndarray = self.rows(first, int(rows.max()) + 1)[rows[:, None] - first, columns]
        return found

    @functools.cached_property
    def _places(self) -> tuple[Places, Places]:
        """Of every padded row and column, the one of the enlarged picture that it repeats."""
        rows, columns = (
            np.pad(np.pad(np.arange(side), (0, exact - side), mode="edge"), (0, padded - exact), mode="symmetric")
            for side, exact, padded in zip(self.target, self.exact_size, self.size, strict=True)
        )
        return rows, columns
