"""The thread that drives the devices: batches of alike jobs through the model, one after another.

Results and previews are encoded on threads of their own: a PNG of 2048x2048 takes a second of a core.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import io
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from faithdiff_jax.errors import Cancelled
from faithdiff_jax.files import images
from faithdiff_jax.files.rows import save_restored
from faithdiff_jax.files.sheets import at_most
from faithdiff_jax.inference import restoration
from faithdiff_jax.inference.making import Making
from faithdiff_jax.service.jobs import Job, JobState
from faithdiff_jax.service.queue import JobQueue
from faithdiff_jax.service.uploads import read_picture

if TYPE_CHECKING:
    from faithdiff_jax.inference.pipeline import FaithDiff

PREVIEW_SIDE = 1024
"""In pixels: previews of larger pictures are reduced."""
PREVIEW_QUALITY = 85
ENCODERS = 2
"""Threads that encode while the devices are at work."""

Explain = Callable[[BaseException], tuple[int, str]]
"""Exit code and line for an error, as the commands have it."""


class Worker(threading.Thread):
    """Restores what is in the queue until that is closed and empty."""

    def __init__(self, model: "FaithDiff", queue: JobQueue, making: Making, explain: Explain):
        super().__init__(name="faithdiff-worker", daemon=True)
        self._model, self._queue, self._making, self._explain = model, queue, making, explain
        self._encoders = concurrent.futures.ThreadPoolExecutor(ENCODERS, "faithdiff-encoder")
        self._writing: collections.deque[concurrent.futures.Future[None]] = collections.deque()
        self._showing: set[Job] = set()

    def run(self) -> None:
        """Batch after batch; nothing that happens to one ends the thread."""
        with self._encoders:
            while (batch := self._queue.next_batch()) is not None:
                loaded = []
                for job in batch:
                    try:
                        loaded.append((job, read_picture(job.source, job.name)))
                    except Exception as error:  # it was looked at before it came here
                        self._failed(job, error)
                self._restore(loaded)
                while len(self._writing) > len(batch):  # results of two batches are in memory, not of more
                    self._writing.popleft().result()

    def _restore(self, loaded: Sequence[tuple[Job, images.Picture]]) -> None:
        """A batch; one that fails is done one by one, so that only those at fault fail."""
        for job, _ in loaded:
            if job.stopped:
                self._queue.end(job, JobState.CANCELLED)
        loaded = [(job, picture) for job, picture in loaded if not job.stopped]
        if not loaded:
            return
        jobs = [job for job, _ in loaded]
        requests = [
            restoration.Request(image=picture.rgb, caption=job.caption, seed=job.options.seed)
            for job, picture in loaded
        ]
        try:
            on_step = functools.partial(self._look, jobs)
            restored = restoration.restore_all(self._model, requests, jobs[0].options, on_step=on_step)
        except Cancelled:
            for job in jobs:
                self._queue.end(job, JobState.CANCELLED)
        except Exception as error:
            if len(loaded) == 1:
                self._failed(jobs[0], error)
            else:
                for one in loaded:
                    self._restore([one])
        else:
            for (job, picture), result in zip(loaded, restored, strict=True):
                self._writing.append(self._encoders.submit(self._write, job, picture, result.image))

    def _look(self, jobs: Sequence[Job], step: int, steps: int, preview: Callable[[int], Any]) -> bool:
        """Called after every step; goes on while somebody wants one of the pictures."""
        wanted = False
        for number, job in enumerate(jobs):
            if self._queue.progress(job, step, steps):
                wanted = True
                if job.preview_wanted and job not in self._showing:
                    self._showing.add(job)
                    self._encoders.submit(self._show, job, step, preview(number))
        return wanted

    def _show(self, job: Job, step: int, picture: Any) -> None:
        try:
            self._queue.show(job, step, encoded(picture))
        finally:
            self._showing.discard(job)

    def _write(self, job: Job, picture: images.Picture, restored: Any) -> None:
        try:
            making = dataclasses.replace(self._making, options=job.options)
            text = making.text(job.options.seed, job.caption)
            job.notes += save_restored(job.target, restored, picture, job.options.scale, text)
        except Exception as error:
            self._failed(job, error)
        else:
            self._queue.end(job, JobState.DONE)

    def _failed(self, job: Job, error: Exception) -> None:
        code, line = self._explain(error)
        self._queue.end(job, JobState.FAILED, code=code, error=line)


def encoded(picture: Any) -> bytes:
    """A preview as JPEG, reduced to `PREVIEW_SIDE`."""
    file = io.BytesIO()
    Image.fromarray(at_most(picture, PREVIEW_SIDE)).save(file, "JPEG", quality=PREVIEW_QUALITY)
    return file.getvalue()
