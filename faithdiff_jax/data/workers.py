"""The processes that make batches: how they start, how they end with the run, and how the loss of one ends it."""

import contextlib
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator

import cv2

from faithdiff_jax.errors import RunError

GRAIN_WORKER = "grain-process-prefetch"
"""What grain's workers are called."""


class WorkerError(RunError):
    """A worker died, or gave nothing for too long."""


def start_worker(number: int, count: int) -> None:
    """Prepare a worker process: it has a core to itself, leaves signals to the main process, and ends with it."""
    cv2.setNumThreads(0)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Terminals and schedulers send these to all processes of a job; the main one ends its workers when it has saved.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    # A main process that is killed cannot stop its workers: they would hold their memory for ever.
    threading.Thread(target=_end_with_main_process, daemon=True).start()


@contextlib.contextmanager
def lost_workers_end_it(seconds: float) -> Iterator[None]:
    """Inside, the next batch of grain's workers is waited for.

    Raises:
        WorkerError: one died, or none came for so many seconds; then all workers are killed.
    """
    late = threading.Event()

    def give_up() -> None:
        late.set()
        for worker in multiprocessing.active_children():
            if worker.name.startswith(GRAIN_WORKER):
                worker.kill()

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        code = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
        if late.is_set():
            raise WorkerError(f"data: no batch came for {seconds:g} s (data.timeout): the workers hang") from None
        if code is None:
            raise
        raise WorkerError(f"data: a worker died ({_ended_by(int(code[1]))})") from None
    finally:
        timer.cancel()


def _ended_by(code: int) -> str:
    if code == -signal.SIGKILL:
        return "SIGKILL, as the system sends when memory runs out: lower data.workers or data.prefetch"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}, see above"


def _end_with_main_process() -> None:
    main_process = multiprocessing.parent_process()
    if main_process is not None:
        main_process.join()
        os._exit(1)
