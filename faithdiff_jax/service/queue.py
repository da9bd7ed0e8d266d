"""The bounded queue between those who send pictures and the one thread that restores them."""

import contextlib
import math
import threading
import time
from collections.abc import Iterator

from faithdiff_jax.errors import RunError
from faithdiff_jax.service.jobs import Job, JobState
from faithdiff_jax.service.settings import ServiceOptions

GATHERING = 0.05
"""Seconds that a batch which could hold more waits for them: those who send together are restored together."""


class Busy(RunError):
    """Nothing more is taken on now; `retry_after` says in how many seconds to ask again."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class JobQueue:
    """All jobs: those that wait, in order of arrival, those that run, and those that have ended but are kept.

    Every method may be called from any thread.
    """

    def __init__(self, settings: ServiceOptions):
        self._settings = settings
        self._jobs: dict[str, Job] = {}
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._reserved = 0
        self._open = True
        self._turn = 1.0  # seconds that a batch takes, of the last ones
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place while a picture is received and looked at.

        Raises:
            Busy: there is none, or the service is about to stop.
        """
        with self._changed:
            if not self._open:
                raise Busy("the service is about to stop and takes no more pictures", self._settings.linger + 1)
            if len(self._waiting) + self._reserved >= self._settings.queue:
                seconds = min(3600, max(1, math.ceil(self._turn)))
                line = f"{self._settings.queue} pictures wait already, ask again in {seconds} s"
                raise Busy(line, seconds)
            self._reserved += 1
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= 1
                self._changed.notify_all()

    def add(self, job: Job) -> None:
        """Put a job at the end; inside `place`, so that there is room, even when the service is about to stop."""
        with self._changed:
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._changed.notify_all()

    def get(self, name: str) -> Job | None:
        """The job of that id, if it is known and has not expired."""
        with self._changed:
            self._expire()
            return self._jobs.get(name)

    def described(self, job: Job) -> dict[str, object]:
        """As `Job.described`."""
        with self._changed:
            place = self._waiting.index(job) + 1 if job in self._waiting else None
            return job.described(place)

    def counts(self) -> dict[str, int]:
        """How many wait, are running, and have ended but are kept."""
        with self._changed:
            self._expire()
            waiting, running = len(self._waiting), len(self._running)
            return {"waiting": waiting, "running": running, "kept": len(self._jobs) - waiting - running}

    @property
    def open(self) -> bool:
        """Whether pictures are taken on."""
        return self._open

    def next_batch(self) -> list[Job] | None:
        """Wait for work: the job that came first, with others that are alike; None once all is done and closed."""
        with self._changed:
            while True:
                if not self._waiting:
                    if not self._open and not self._reserved:
                        return None
                    self._changed.wait(1)
                    self._expire()
                    continue
                first = self._waiting[0]
                batch = [job for job in self._waiting if job.alike == first.alike][: first.together]
                patience = first.since + GATHERING - time.monotonic()
                if len(batch) == first.together or patience <= 0:
                    break
                self._changed.wait(patience)
            for job in batch:
                self._waiting.remove(job)
                self._running.append(job)
                job.state, job.since = JobState.RUNNING, time.monotonic()
            return batch

    def progress(self, job: Job, step: int, steps: int) -> bool:
        """Note the steps done; returns whether to go on."""
        with self._changed:
            job.step, job.steps = step, steps
            return not job.stopped

    def show(self, job: Job, step: int, preview: bytes) -> None:
        """Keep a preview of a job as it was after a step, unless the job has ended meanwhile."""
        with self._changed:
            if not job.final:
                job.preview, job.preview_step, job.preview_wanted = preview, step, False

    def end(self, job: Job, state: JobState, *, code: int = 0, error: str | None = None) -> None:
        """Say what became of a running job; one that was cancelled meanwhile stays so."""
        with self._changed:
            if job in self._running:
                self._running.remove(job)
                self._turn += 0.3 * (time.monotonic() - job.since - self._turn)
                if not job.final:
                    self._finish(job, state, code, error)
            if job.state is not JobState.DONE:
                job.remove_files()
            else:
                job.source.unlink(missing_ok=True)

    def cancel(self, job: Job) -> None:
        """End a job that waits, stop one that runs at its next step, remove the result of one that is done."""
        with self._changed:
            job.stopped = True
            if job in self._waiting:
                self._waiting.remove(job)
                job.remove_files()
            elif job not in self._running:
                job.remove_files()
            if job.state in (JobState.WAITING, JobState.RUNNING, JobState.DONE):
                self._finish(job, JobState.CANCELLED)

    def close(self) -> None:
        """Take on no more."""
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def hand_back(self) -> None:
        """End all that wait or run, so that those who sent them can send them elsewhere."""
        with self._changed:
            for job in [*self._waiting, *self._running]:
                job.stopped = True
                line = "the service stopped before it was restored, send it again"
                self._finish(job, JobState.HANDED_BACK, error=line)
            for job in self._waiting:
                job.remove_files()
            self._waiting.clear()
            self._changed.notify_all()

    @property
    def idle(self) -> bool:
        """Whether nothing waits, runs or is being received."""
        with self._changed:
            return not (self._waiting or self._running or self._reserved)

    @property
    def unfetched(self) -> int:
        """How many results nobody has fetched, or errors nobody has seen."""
        with self._changed:
            return sum(job.final and not job.fetched for job in self._jobs.values())

    def _finish(self, job: Job, state: JobState, code: int = 0, error: str | None = None) -> None:
        job.state, job.code, job.error, job.since = state, code, error, time.monotonic()
        job.preview = None
        self._expire()

    def _expire(self) -> None:
        """Remove what has been kept long enough, and the oldest of too many."""
        ended = sorted((job for job in self._jobs.values() if job.final), key=lambda job: job.since)
        oldest, surplus = time.monotonic() - self._settings.keep, len(ended) - self._settings.kept
        for number, job in enumerate(ended):
            if (number < surplus or job.since < oldest) and job not in self._running:
                job.remove_files()
                del self._jobs[job.id]
