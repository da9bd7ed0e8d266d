"""The names of samplers and spacings, apart from the code: a command line offers them without importing JAX."""

SAMPLERS = ("euler", "ddpm", "dpmpp_2m", "unipc")
"""In the order of `samplers.SAMPLERS`, which has its keys from here."""
MULTISTEP = SAMPLERS[2:]
"""Those that use the predictions of earlier steps."""
SIGMA_SPACINGS = ("default", "karras", "exponential")
"""How a sampler spreads its noise levels: those of its timesteps, or along a curve (see `schedule.spread`)."""
