"""The names of the samplers, apart from the samplers: a command line offers them without importing JAX."""

SAMPLERS = ("euler", "ddpm")
"""In the order of `samplers.SAMPLERS`, which has its keys from here."""
