"""FaithDiff image restoration in JAX/Flax."""

from faithdiff_jax._version import __version__

__all__ = ["__version__"]
