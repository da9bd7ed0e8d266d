"""FaithDiff image restoration in JAX/Flax: `FaithDiff.load(model_dir).restore(image, caption)`."""

import pathlib
from typing import TYPE_CHECKING

from faithdiff_jax._version import __version__

if TYPE_CHECKING:
    from faithdiff_jax.inference.pipeline import FaithDiff
    from faithdiff_jax.models.config import FaithDiffConfig

__all__ = ["SMALL_MODEL", "FaithDiff", "FaithDiffConfig", "__version__"]

SMALL_MODEL = pathlib.Path(__file__).parent / "small_model"
"""The directory of the small model that comes with the package: for trying things without a download."""


def __getattr__(name: str):
    """Load the heavy names when they are first asked for: importing the package imports nothing else."""
    if name == "FaithDiff":
        from faithdiff_jax.inference.pipeline import FaithDiff

        return FaithDiff
    if name == "FaithDiffConfig":
        from faithdiff_jax.models.config import FaithDiffConfig

        return FaithDiffConfig
    raise AttributeError(f"module 'faithdiff_jax' has no attribute {name!r}")
