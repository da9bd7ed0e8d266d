"""FaithDiff image restoration in JAX/Flax: `FaithDiff.load(model_dir).restore(image, caption)`."""

import importlib
import pathlib
from typing import TYPE_CHECKING

from faithdiff_jax._version import __version__

if TYPE_CHECKING:
    from faithdiff_jax.inference.options import RestoreOptions
    from faithdiff_jax.inference.pipeline import FaithDiff
    from faithdiff_jax.models.config import FaithDiffConfig

__all__ = ["SMALL_MODEL", "FaithDiff", "FaithDiffConfig", "RestoreOptions", "__version__"]

SMALL_MODEL = pathlib.Path(__file__).parent / "small_model"
"""The directory of the small model that comes with the package: for trying things without a download."""


_HEAVY = {
    "FaithDiff": "faithdiff_jax.inference.pipeline",
    "FaithDiffConfig": "faithdiff_jax.models.config",
    "RestoreOptions": "faithdiff_jax.inference.options",
}


def __getattr__(name: str) -> object:
    """Load the heavy names when they are first asked for: importing the package imports nothing else."""
    if name not in _HEAVY:
        raise AttributeError(f"module 'faithdiff_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HEAVY[name]), name)
