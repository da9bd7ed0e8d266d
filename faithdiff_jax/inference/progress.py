"""What takes long says so, through the package's log: a line when it begins and one when it is done.

A command shows these lines as it likes; `BEGINS` and `ENDS` in a record's `stage` tell it which is which.
"""

import contextlib
import logging
import time
from collections.abc import Iterator

log = logging.getLogger("faithdiff_jax")

BEGINS, ENDS = "begins", "ends"


@contextlib.contextmanager
def long_task(message: str, remark: str = "") -> Iterator[None]:
    """Log `message` and a remark on it now, and `message` with the seconds it took when the block is left."""
    begin = time.perf_counter()
    log.info("%s%s", message, f"; {remark}" if remark else "", extra={"stage": BEGINS})
    try:
        yield
    finally:
        log.info("%s: %.0f s", message, time.perf_counter() - begin, extra={"stage": ENDS})


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Put the seconds that a block takes into `seconds`, under the name of a stage."""
    begin = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - begin
