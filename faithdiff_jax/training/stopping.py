"""What ends a run before its last step: signals of people and clusters, steps that hang, and data that others wait for.

SIGTERM, SIGUSR1, SIGINT of any process --agreed on between steps--> all save the same step and end together
a step that takes too long --> stacks of all threads, and the end
"""

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

log = logging.getLogger("faithdiff_jax")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what SLURM sends before the time is up, if a job asks for it (`--signal=USR1@120`)."""

GRACE = 1.0
"""Seconds between the line that says why a run ends and the stacks."""

SLOW = 2.0
"""A process whose data takes so many times as long as that of most is told of."""


class StopSignals:
    """Signals that stop a run, while the block runs: they interrupt its start, and let a step under way finish.

    A second Ctrl-C interrupts at once. With several processes, JAX's preemption service has SIGTERM: it tells all of
    them when one is told, and has them agree on a step. The other signals are passed on to it.
    """

    def __init__(self) -> None:
        self.told = self.running = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # Signals reach the main thread only, and only there may handlers be set.
        if threading.current_thread() is threading.main_thread():
            ours = [number for number in SIGNALS if jax.process_count() == 1 or number != signal.SIGTERM]
            self._before = {number: signal.signal(number, self._handle) for number in ours}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def at(self, step: int) -> bool:
        """Whether to stop before another step, as all processes do at the same number of steps; ask at each."""
        if jax.process_count() == 1:
            return self.told
        return bool(multihost_utils.reached_preemption_sync_point(step))

    def _handle(self, number: int, frame: object) -> None:
        again, self.told = self.told, True
        if (not self.running and jax.process_count() == 1) or (again and number == signal.SIGINT):
            raise KeyboardInterrupt
        log.info("told to stop (%s): finishing this step and saving", signal.Signals(number).name)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Watchdog:
    """Ends the process where something takes longer than it may: a collective that waits for ever, a dead disk.

    It says what, writes the stacks of all threads to stderr, and ends with exit code 1, whatever the threads wait in.
    """

    def __init__(self, seconds: float | None):
        """`seconds` are how long it may take, None for as long as it likes."""
        self._seconds = seconds

    @contextlib.contextmanager
    def over(self, what: str) -> Iterator[None]:
        """Watch what is done inside; one at a time in a process."""
        if self._seconds is None:
            yield
            return
        line = f"error: {what} has taken {self._seconds:g} s (step_timeout); what every thread is at:"
        timer = threading.Timer(self._seconds, lambda: print(f"\n{line}", file=sys.stderr, flush=True))
        timer.daemon = True
        timer.start()
        faulthandler.dump_traceback_later(self._seconds + GRACE, exit=True)
        try:
            yield
        finally:
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()


class DataWait:
    """How long a step waits for its data, in the process where it takes longest: all wait for that one."""

    def __init__(self) -> None:
        self._seconds, self._steps = 0.0, 0

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Take the time of what is done inside: the fetching of one step's data."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds, self._steps = self._seconds + time.perf_counter() - begin, self._steps + 1

    def shared(self) -> dict[str, float]:
        """Seconds a step since the last call, of the slowest process, and with several of them which that is.

        All processes call it at the same step.
        """
        mean = self._seconds / max(1, self._steps)
        self._seconds, self._steps = 0.0, 0
        if jax.process_count() == 1:
            return {"data_seconds": mean}
        means = np.ravel(multihost_utils.process_allgather(np.float32(mean)))
        slowest, usual = int(np.argmax(means)), float(np.median(means))
        if jax.process_index() == 0 and means[slowest] > SLOW * usual + 1:
            log.warning(
                "process %d waits %.1f s a step for its data, most others %.1f s: all wait for it",
                slowest, means[slowest], usual,
            )  # fmt: skip
        return {"data_seconds": float(means[slowest]), "data_slowest_process": slowest}
