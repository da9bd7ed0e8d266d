"""The pictures of a run of `faithdiff restore`, batch by batch.

jobs -> batches of one padded size -> read on threads -> restored -> written on threads -> a line of the manifest
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from faithdiff_jax.cli.command import asked_to_stop, trace
from faithdiff_jax.cli.describe import Captions, caption_of
from faithdiff_jax.cli.exit_codes import DONE
from faithdiff_jax.cli.explain import explain
from faithdiff_jax.cli.jobs import Job
from faithdiff_jax.cli.progress import say
from faithdiff_jax.cli.restore_records import note_found, source_record
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.attribution import attribution_sheet
from faithdiff_jax.evaluation.pictures import comparison
from faithdiff_jax.files import images
from faithdiff_jax.files.captions import Caption, too_long
from faithdiff_jax.files.listing import list_images
from faithdiff_jax.files.manifest import Manifest
from faithdiff_jax.files.rows import save_restored
from faithdiff_jax.inference import restoration
from faithdiff_jax.inference.color import Tint
from faithdiff_jax.inference.frames import Frames
from faithdiff_jax.inference.making import Making

if TYPE_CHECKING:
    from faithdiff_jax.inference.pipeline import FaithDiff
    from faithdiff_jax.inference.streaming import StreamedPicture

THREADS = 2
"""That read, and as many that write, while devices work."""
WAIT = 0.5
"""Seconds between two looks at what other processes have in hand."""


@dataclasses.dataclass(kw_only=True)
class Loaded:
    """A job whose picture and caption have been read, and what is noted of it."""

    job: Job
    picture: images.Picture
    caption: Caption
    words: list[str]
    notes: list[str]
    seconds: dict[str, float]
    source: dict[str, Any]
    tint: Tint | None


class FolderRun:
    """One run; `faults` are lines about pictures that failed, `code` the worst of their exit codes."""

    def __init__(
        self,
        model: "FaithDiff",
        making: Making,
        kept: Manifest,
        arguments: argparse.Namespace,
        made: Captions,
        sources: Sequence[pathlib.Path],
    ):
        """`sources` are all pictures of the folder, also those that need nothing done."""
        self.model, self.making, self.kept, self.arguments, self.made = model, making, kept, arguments, made
        self.options = making.options
        self.faults: list[str] = []
        self.code = DONE
        self._frames = None if making.frames is None else Frames(sources, making.frames)
        self._aside: list[Job] = []

    def restore(self, jobs: Sequence[Job], *, alone: bool = False) -> None:
        """Do the jobs; a failed one is noted and stops no other, unless it is `alone` or the disk is full.

        Raises:
            KeyboardInterrupt: it was asked for once, and what was in hand is done; or it was asked for twice.
        """
        with asked_to_stop() as stop, tqdm(total=len(jobs), unit="picture", disable=len(jobs) == 1) as bar:
            while jobs and not stop():
                self._work(self._batches(jobs), alone, bar, stop)
                jobs = self._left_by_others(bar, stop)
            if stop():
                raise KeyboardInterrupt

    def _work(self, batches: Sequence[list[Job]], alone: bool, bar: "tqdm[Any]", stop: Callable[[], bool]) -> None:
        """Do what of the batches no other process has in hand; what one has is put aside."""
        waiting = collections.deque(batches)
        reading: collections.deque[list[tuple[Job, concurrent.futures.Future[Loaded]]]] = collections.deque()
        writing: collections.deque[tuple[Job, concurrent.futures.Future[Loaded]]] = collections.deque()
        with (
            concurrent.futures.ThreadPoolExecutor(THREADS) as readers,
            concurrent.futures.ThreadPoolExecutor(THREADS) as writers,
        ):
            while (waiting or reading) and not stop():
                while waiting and len(reading) < 2:
                    reading.append(
                        [(job, readers.submit(self._read, job)) for job in self._ours(waiting.popleft(), bar)]
                    )
                loaded: list[Loaded] = []
                for job, future in reading.popleft():
                    with self._noted(job, alone, bar):
                        loaded.append(future.result())
                for one, restored in self._restored(loaded):
                    with self._noted(one.job, alone, bar):
                        if isinstance(restored, Exception):
                            raise restored
                        writing.append((one.job, writers.submit(self._write, one, *restored)))
                while len(writing) > 2 * THREADS:
                    self._finish(*writing.popleft(), alone, bar)
            for batch in reading:
                for _, future in batch:
                    future.cancel()
            for job, future in writing:
                self._finish(job, future, alone, bar)

    def _ours(self, jobs: Sequence[Job], bar: "tqdm[Any]") -> list[Job]:
        """Those that are left to do, now claimed; those that another process has in hand are put aside."""
        ours = []
        for job in jobs:
            if not self.kept.claim(job.target.name):
                self._aside.append(job)
            elif self.kept.done_elsewhere(job.target.name):
                self._is_done(job, bar)
            elif self.kept.shared and os.path.lexists(job.target):  # its process was killed before it had a line
                note_found(job, self.kept)
                self._is_done(job, bar)
            else:
                ours.append(job)
        return ours

    def _left_by_others(self, bar: "tqdm[Any]", stop: Callable[[], bool]) -> list[Job]:
        """Of what was put aside, what its process did not finish: waits until there is some, or all is done."""
        said = False
        while self._aside and not stop():
            aside, self._aside = self._aside, []
            if ours := self._ours(aside, bar):
                return ours
            if self._aside and not said:
                say(f"waiting for {len(self._aside)} pictures that other processes have in hand")
                said = True
            time.sleep(WAIT if self._aside else 0)
        return []

    def _is_done(self, job: Job, bar: "tqdm[Any]") -> None:
        self.kept.release(job.target.name)
        bar.update()

    def _finish(self, job: Job, future: "concurrent.futures.Future[Loaded]", alone: bool, bar: "tqdm[Any]") -> None:
        with self._noted(job, alone, bar):
            done = future.result()
            self._is_done(job, bar)
            for note in done.notes:
                say(f"{job.source}: {note}")
            say(f"{job.source} -> {job.target}")

    @contextlib.contextmanager
    def _noted(self, job: Job, alone: bool, bar: "tqdm[Any]") -> Iterator[None]:
        """Note an error of a picture, unless it ends the run."""
        try:
            yield
        except BrokenPipeError:  # whoever read our output has gone
            raise
        except Exception as error:  # no reason to stop, whatever it is
            if alone or _is_full(error):  # every other picture would fail too, after all the work on it
                raise
            code, line = explain(error)
            failed = {"error": line, "code": code, **self.making.described(job.seed)}
            self.kept.add(job.target.name, {**source_record(job), "seed": job.seed, **failed})
            trace(error)
            self.code = max(self.code, code)  # bad input goes before a failed run
            self.faults.append(line if str(job.source) in line else f"{job.source}: {line}")
            self._is_done(job, bar)

    def _batches(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """Jobs of one padded size after one another, by what the headers of their files say, in order of appearance."""
        by_size: dict[Any, list[Job]] = collections.defaultdict(list)
        for job in jobs:
            by_size[self._padded_size(job.source) if len(jobs) > 1 else None].append(job)
        batches = []
        for size, alike in by_size.items():
            count = 1
            if size is not None and not self.arguments.attribute:
                count = restoration.pictures_together(self.options, self.model.config, size)
            batches += [alike[first : first + count] for first in range(0, len(alike), count)]
        return batches

    def _padded_size(self, path: pathlib.Path) -> tuple[int, int] | None:
        """None where there is none: what is wrong is told when the file is read."""
        try:
            return self.options.padded_size(self.model.config, *images.upright_size(path))
        except InputError:
            return None

    def _restored(self, loaded: Sequence[Loaded]) -> Iterator[tuple[Loaded, Any]]:
        """Each with what `_write` takes of it, or the error that came of it: a batch that fails is done one by one."""
        if not loaded:
            return
        try:
            if loaded[0].words:  # alone in its batch
                one = loaded[0]
                image, maps = self.model.attribute(
                    one.picture.rgb, str(one.caption), one.words, self.options, seed=one.job.seed
                )
                results: list[Any] = [(image, maps)]
            else:
                requests = [
                    restoration.Request(image=one.picture.rgb, caption=one.caption, seed=one.job.seed, tint=one.tint)
                    for one in loaded
                ]
                found = restoration.restore_all(self.model, requests, self.options)
                results = [(restored.image, {}) for restored in found]
                for one, restored in zip(loaded, found, strict=True):
                    one.seconds |= restored.seconds
        except Exception as error:
            if len(loaded) == 1:
                yield loaded[0], error
                return
            trace(error)
            for one in loaded:
                yield from self._restored([one])
        else:
            yield from zip(loaded, results, strict=True)

    def _read(self, job: Job) -> Loaded:
        """On a thread."""
        begin = time.perf_counter()
        made = self.made.get(job.source)
        if isinstance(made, InputError):
            raise made
        source = source_record(job)
        picture = images.load_image(job.source)
        images.output_format(job.target, alpha=picture.alpha is not None)
        notes = list(picture.notes)
        caption = caption_of(job.source, made, self.arguments, notes)
        notes += too_long(caption)
        tint = None if self._frames is None else self._frames.tint(job.source, picture.rgb)
        return Loaded(
            job=job,
            picture=picture,
            caption=caption,
            words=self._words_of(caption, notes),
            notes=notes,
            seconds={"read": time.perf_counter() - begin},
            source=source,
            tint=tint,
        )

    def _words_of(self, caption: Caption, notes: list[str]) -> list[str]:
        """Those of the words to attribute to that a caption has; of the others, a note."""
        found = []
        for word in self.arguments.attribute:
            try:
                self.model.tokenizers.positions(str(caption), word)
            except InputError as error:
                notes.append(f"no map: {error}")
            else:
                found.append(word)
        return found

    def _write_beside(self, done: Loaded, restored: np.ndarray, maps: Mapping[str, np.ndarray]) -> None:
        """Comparison and attribution, where they were asked for."""
        job, picture = done.job, done.picture
        if self.arguments.compare:
            reference = _reference(job.source, restored.shape, self.arguments.references)
            images.save_image(job.sheet, comparison(picture.rgb, restored, reference), icc_profile=picture.icc_profile)
        for word, attribution in maps.items():
            images.save_image(job.maps[word], attribution_sheet(restored, word, attribution))

    def _write(self, done: Loaded, restored: "np.ndarray | StreamedPicture", maps: Mapping[str, np.ndarray]) -> Loaded:
        """On a thread; the result itself comes last, so that nothing is missing beside it, and its line at once."""
        begin = time.perf_counter()
        job, picture = done.job, done.picture
        text = self.making.text(job.seed, done.caption)
        if isinstance(restored, np.ndarray):
            self._write_beside(done, restored, maps)
        elif self.arguments.compare:
            done.notes.append("no comparison, the picture is too large for one")
        done.notes += save_restored(job.target, restored, picture, self.options.scale, text)
        done.seconds["write"] = time.perf_counter() - begin
        made = {"input": _size(picture.rgb), "seconds": done.seconds, "error": None, "notes": done.notes}
        described = {"caption": done.caption, **self.making.described(job.seed), **made}
        self.kept.add(job.target.name, {**done.source, "seed": job.seed, **described})
        return done


def _reference(source: pathlib.Path, shape: tuple[int, ...], folder: pathlib.Path | None) -> np.ndarray | None:
    """The true picture of the same stem, if the folder of references has one."""
    found = [] if folder is None else [path for path in list_images(folder) if path.stem == source.stem]
    if not found:
        return None
    reference = images.load_image(found[0]).rgb
    if reference.shape != shape:
        sizes = f"{reference.shape[1]}x{reference.shape[0]}, the restored picture {shape[1]}x{shape[0]}"
        raise InputError(f"{found[0]}: is {sizes}; they must be of one size (see --scale)")
    return reference


def _size(picture: np.ndarray) -> list[int]:
    """Width and height."""
    return [picture.shape[1], picture.shape[0]]


def _is_full(error: BaseException) -> bool:
    """Whether an error is of a disk without space, under whatever it was turned into."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
