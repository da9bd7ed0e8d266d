"""A picture as the networks see it: enlarged, and padded up to a size that pictures can share."""

import dataclasses

import numpy as np
from jaxtyping import Float32, UInt8

from faithdiff_jax.files import images
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.models.config import FaithDiffConfig


@dataclasses.dataclass(frozen=True)
class Canvas:
    """A picture enlarged, and the heights and widths in pixels that it is restored at.

    Attributes:
        upscaled: the picture enlarged, without padding.
        exact_size: of it padded to whole latent pixels, as published.
        size: of it padded to multiples of `RestoreOptions.multiple`; the same as `exact_size` without that.
    """

    upscaled: UInt8[np.ndarray, "H W 3"]
    exact_size: tuple[int, int]
    size: tuple[int, int]

    @classmethod
    def of(cls, image: UInt8[np.ndarray, "h w 3"], options: RestoreOptions, config: FaithDiffConfig) -> "Canvas":
        """Enlarge (h, w, 3); InputError for one too large or too small, before anything is allocated."""
        size = options.padded_size(config, *image.shape[:2])
        exact_size = options.replace(multiple=None).padded_size(config, *image.shape[:2])
        return cls(images.upscale(image, options.scale), exact_size, size)

    def padded(self) -> Float32[np.ndarray, "1 padded_H padded_W 3"]:
        """The picture as a batch of one of `size`, in [-1, 1].

        Up to `exact_size` its last row and column are repeated, as published. From there on it is mirrored, which
        changes the picture less than more repetition would (`benchmarks/padding.py`).
        """
        exact = images.pad(self.upscaled, *self.exact_size)
        rest = [(0, side - exact_side) for side, exact_side in zip(self.size, self.exact_size, strict=True)]
        return images.to_float(np.pad(exact, (*rest, (0, 0)), mode="symmetric"))[None]
