"""What the package logs while a command works, above its progress bar; long tasks with the seconds they have taken."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from faithdiff_jax.cli.explain import printable
from faithdiff_jax.inference.progress import BEGINS, ENDS

Item = TypeVar("Item")

PATIENCE = 2.0  # seconds before a task is called long


@contextlib.contextmanager
def log_above_the_bar(level: int = logging.INFO) -> Iterator[None]:
    """Show the package's log through `tqdm.write` instead of wherever it went before."""
    log = logging.getLogger("faithdiff_jax")
    before = log.handlers, log.propagate, log.level
    handler = _BarHandler()
    log.handlers, log.propagate = [handler], False
    log.setLevel(level)
    try:
        yield
    finally:
        handler.stop()
        log.handlers, log.propagate = before[:2]
        log.setLevel(before[2])


def say(message: str) -> None:
    """Print lines above the progress bar; control characters, of file names for instance, are escaped."""
    tqdm.write("\n".join(printable(line) for line in message.split("\n")))


def tensor_bar(items: Iterable[Item], what: str, count: int) -> Iterable[Item]:
    """Go through `count` tensors with a progress bar on a terminal, and without one elsewhere."""
    return tqdm(items, desc=what, total=count, unit="tensor", disable=None)


class _BarHandler(logging.Handler):
    """Lines above the bar; a task of more than `PATIENCE` seconds has a line with a clock while it lasts."""

    def __init__(self) -> None:
        super().__init__()
        self._clock: _Clock | None = None

    def emit(self, record: logging.LogRecord) -> None:
        stage = getattr(record, "stage", None)
        if stage == BEGINS:
            self.stop()
            self._clock = _Clock(self.format(record))
        elif stage != ENDS or self.stop():
            say(self.format(record))

    def stop(self) -> bool:
        """End the task in progress; whether it was long enough to be shown."""
        clock, self._clock = self._clock, None
        return clock is not None and clock.stop()


class _Clock:
    """A line that says what is being done and for how long; where nobody watches it, it is printed once."""

    def __init__(self, message: str):
        self._message = message
        self._begin = time.perf_counter()
        self._done = threading.Event()
        self._shown = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> bool:
        """Whether the line was shown."""
        self._done.set()
        self._thread.join()
        return self._shown

    def _run(self) -> None:
        if self._done.wait(PATIENCE):
            return
        self._shown = True
        if not sys.stderr.isatty():
            say(f"{self._message} ...")
            return
        with tqdm(bar_format="{desc}", leave=False) as line:
            while not self._done.wait(1):
                line.set_description_str(f"{self._message} ... {time.perf_counter() - self._begin:.0f} s")
