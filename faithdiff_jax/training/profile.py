"""A profile of a few training steps, for TensorBoard and xprof."""

import logging
import pathlib
from typing import Any

import jax

FIRST, LAST = 2, 5
"""Steps of this process: those before are left out, which compile and settle."""

log = logging.getLogger("faithdiff_jax")


def settings() -> jax.profiler.ProfileOptions:
    """How a profile is taken: what the devices do and what JAX does for it, not every call of a Python function.

    Those calls of Python's would be nineteen parts in twenty of the file, and slow down what is to be measured.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return options


class Profile:
    """Traces steps `FIRST` to `LAST` of a process, or those that there are, into a folder; nothing without a folder."""

    def __init__(self, folder: pathlib.Path | None):
        self.folder = folder
        self._steps, self._on = 0, False

    def before(self) -> None:
        """Called before each step."""
        self._steps += 1
        if self.folder is not None and self._steps == FIRST:
            jax.profiler.start_trace(str(self.folder), profiler_options=settings())
            self._on = True

    def after(self, result: Any) -> None:
        """Called after each step with what it gives, which is waited for before the trace ends."""
        if self._on and self._steps == LAST:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Write what was traced, if that is not done yet."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            log.info("profile of steps %d to %d written to %s", FIRST, min(self._steps, LAST), self.folder)
