"""Evaluating: every picture of every set restored or found, measured, and kept in a folder of results.

    sets, methods --> a picture's files --restored here, or by others--> figures --> RESULT/METHOD.csv

Rows are written after each few pictures and when a run ends however it ends, so that the same command takes up a run
that was interrupted.
"""

import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.matching import match_names, stem
from faithdiff_jax.evaluation.measuring import NO_REFERENCE, Metrics, measure
from faithdiff_jax.evaluation.methods import Method, TimedRestorer, caption_of, middle
from faithdiff_jax.evaluation.resources import peak_memory
from faithdiff_jax.evaluation.results import DIGEST, WHOLE_SET, Results, Row, check_picture_name, digest
from faithdiff_jax.evaluation.testsets import Picture, TestSet, left_over
from faithdiff_jax.files.images import load_image, save_image
from faithdiff_jax.files.listing import list_pictures

PIXELS_AT_ONCE = 2**21
"""Of pictures that are measured together: eight of 512x512."""


@dataclass
class Report:
    """What a run has to say beside its results.

    Attributes:
        faults: a line for each picture that could not be used, or has no partner.
        used: the pictures that tables are of, by (method, set): with other files, other pictures may have been
            measured before.
        files: where the restored pictures lie, by (method, set) and name.
        reasons: why a method has no figure of a set, by (method, set, metric), the metric "" for all of them.
        restored: how many pictures were restored.
        figures: how many figures were computed.
        attempted: how many pictures there were.
    """

    faults: list[str] = field(default_factory=list)
    used: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    files: dict[tuple[str, str], dict[str, Path]] = field(default_factory=dict)
    reasons: dict[tuple[str, str, str], str] = field(default_factory=dict)
    restored: int = 0
    figures: int = 0
    attempted: int = 0


class Job(NamedTuple):
    """One picture of one method: where it lies, or is to lie, and what belongs to it."""

    name: str
    file: Path
    picture: Picture


class Waiting(NamedTuple):
    """A picture that is to be measured: its row, its pixels and its reference's."""

    job: Job
    row: Row
    pixels: UInt8[np.ndarray, "h w 3"]
    reference: UInt8[np.ndarray, "H W 3"] | None


Excuse = Callable[[Exception], str]
"""What is said of an error that concerns one picture; raises it again if it concerns the run."""


def only_bad_input(error: Exception) -> str:
    """Excuse what the user gave; everything else ends the run."""
    if not isinstance(error, InputError):
        raise error
    return str(error)


class Evaluation:
    """A run over sets and methods."""

    def __init__(self, results: Results, metrics: Metrics, excuse: Excuse = only_bad_input):
        self.results = results
        self.metrics = metrics
        self.report = Report()
        self._excuse = excuse
        self._digests: dict[Path, str] = {}
        self._restoring = 0

    def run(self, sets: Sequence[TestSet], methods: Sequence[Method]) -> Report:
        """Measure whatever is not measured yet.

        Raises:
            InputError: settings that do not fit the results, or results that cannot be read or written.
        """
        for test_set in sets:
            self.report.faults += [f"{test_set.name}: {line}" for line in test_set.mismatches]
        for method in methods:
            self.results.add(method.name, method.settings)
            self.results.rows(method.name)  # a damaged file is told before any work
        for method in methods:
            restorer = TimedRestorer(method.load)
            for test_set in sets:
                self._run_one(test_set, method, restorer)
            if restorer.used:
                self._note_peak(method)
        for method_name in self.results.methods:
            for test_set in sets:
                if (method_name, test_set.name) not in self.report.used:
                    self.report.used[method_name, test_set.name] = self._as_before(method_name, test_set)
        return self.report

    def _as_before(self, method: str, test_set: TestSet) -> set[str]:
        """Pictures of a method that is in the results only: those that are of the set as it is now."""
        return {
            picture
            for (its, picture), row in self.results.rows(method).items()
            if its == test_set.name
            and (
                not test_set.pictures
                or (
                    picture in test_set.pictures and row.reference == self._digest(test_set.pictures[picture].reference)
                )
            )
        }

    def _note_peak(self, method: Method) -> None:
        """Keep what memory was needed, if only this method has restored here: the process's peak says no more."""
        self._restoring += 1
        if self._restoring == 1:
            self.results.peaks[method.name] = peak_memory()
            self.results.save(method.name)

    def _run_one(self, test_set: TestSet, method: Method, restorer: "TimedRestorer") -> None:
        jobs = self._found(test_set, method) if method.load is None else self._to_restore(test_set, method)
        used = self.report.used[method.name, test_set.name] = set()
        if not jobs:
            return
        rows = self.results.rows(method.name)
        bar = tqdm(jobs, desc=f"{method.name}, {test_set.name}", unit="picture", disable=None)
        place = method.name, test_set.name
        waiting: list[Waiting] = []
        pixels = 0
        try:
            for job in bar:
                self.report.attempted += 1
                try:
                    key = (test_set.name, check_picture_name(job.name))
                    restored_before = self.report.restored
                    row = self._fresh_row(rows.get(key), job)
                    if method.load is not None:
                        self._restore(job, row, test_set, restorer)
                    ours = digest(job.file)
                    if row.restored != ours:
                        row.restored, row.figures = ours, {}
                    rows[key] = row
                    used.add(job.name)
                    self.report.files.setdefault((method.name, test_set.name), {})[job.name] = job.file
                    if self.report.restored > restored_before:
                        self.results.save(method.name)  # minutes may have gone into it
                    if all(name in row.figures for name in self._wanted(job)):
                        continue
                    picture = load_image(job.file)
                    reference = None if job.picture.reference is None else load_image(job.picture.reference).rgb
                except Exception as error:
                    self._fault(job, self._excuse(error))
                    continue
                row.notes = "; ".join(picture.notes)
                waiting.append(Waiting(job, row, picture.rgb, reference))
                pixels += picture.rgb.shape[0] * picture.rgb.shape[1]
                if pixels >= PIXELS_AT_ONCE:
                    self._measure(place, waiting)
                    waiting, pixels = [], 0
                    self.results.save(method.name)
            self._measure(place, waiting)
            self._compare_folders(place, jobs)
        finally:
            if rows:
                self.results.save(method.name)

    def _wanted(self, job: Job) -> Iterator[str]:
        """The metrics that a picture can have."""
        for name, metric in self.metrics.ready.items():
            if job.picture.reference is not None or not metric.info.needs_reference:
                yield name

    def _fresh_row(self, row: Row | None, job: Job) -> Row:
        """The picture's row as far as its files are still the same."""
        reference = self._digest(job.picture.reference)
        if row is None or row.reference != reference:
            # Another reference leaves what was restored, and how long that took.
            row = Row() if row is None else Row(input=row.input, restored=row.restored, seconds=row.seconds)
            row.reference = reference
        return row

    def _restore(self, job: Job, row: Row, test_set: TestSet, restorer: "TimedRestorer") -> None:
        """Restore the picture unless that was done from the same bytes and the result is untouched."""
        source = job.picture.input
        assert source is not None
        caption = caption_of(source, test_set.captions)
        ours = digest(source, caption, f"{test_set.scale:g} {test_set.crop}")
        if row.input == ours and job.file.exists() and digest(job.file) == row.restored:
            return
        low = load_image(source).rgb
        if test_set.crop is not None:
            low = middle(low, test_set.crop)
        restored, seconds = restorer(low, caption, test_set.scale)
        job.file.parent.mkdir(parents=True, exist_ok=True)
        save_image(job.file, restored)
        row.input, row.restored, row.seconds, row.figures = ours, digest(job.file), seconds, {}
        self.report.restored += 1

    def _measure(self, place: tuple[str, str], waiting: Sequence[Waiting]) -> None:
        try:
            found = measure(
                self.metrics,
                [one.pixels for one in waiting],
                [one.reference for one in waiting],
                [one.row.figures for one in waiting],
            )
        except Exception as error:
            if len(waiting) > 1:
                for one in waiting:
                    self._measure(place, [one])
            elif waiting:
                self._fault(waiting[0].job, self._excuse(error))
            return
        for (job, row, *_), measurement in zip(waiting, found, strict=True):
            row.figures |= measurement.figures
            self.report.figures += len(measurement.figures)
            row.notes = "; ".join([*filter(None, [row.notes]), *(f"{n}: {r}" for n, r in measurement.notes.items())])
            names_by_reason: dict[str, list[str]] = defaultdict(list)
            for name, reason in measurement.notes.items():
                self.report.reasons.setdefault((*place, name), reason)
                names_by_reason[reason].append(name)
            for reason, names in names_by_reason.items():
                if reason != NO_REFERENCE:  # of the whole set, not of a picture
                    self._fault(job, f"no {', '.join(names)}: {reason}")

    def _compare_folders(self, place: tuple[str, str], jobs: Sequence[Job]) -> None:
        """Metrics of all pictures together with all references, of those that have one and could be used."""
        method, set_name = place
        rows = self.results.rows(method)
        known = {name: rows[set_name, name] for name in self.report.used[place]}
        usable = [job for job in jobs if job.name in known and job.picture.reference is not None]
        if not usable:
            return
        row = rows.get((set_name, WHOLE_SET), Row())
        state = [(name, its.restored, its.reference) for name, its in sorted(known.items())]
        ours = hashlib.sha256(repr(state).encode("utf-8")).hexdigest()[:DIGEST]
        if row.restored != ours:
            row = Row(restored=ours)
        for name, metric in self.metrics.folders.items():
            if name in row.figures:
                continue
            with tempfile.TemporaryDirectory() as temporary:
                # Links to exactly these pictures: the folders may hold others.
                folders = Path(temporary, "restored"), Path(temporary, "references")
                for folder, files in zip(
                    folders, zip(*((j.file, j.picture.reference) for j in usable), strict=True), strict=True
                ):
                    folder.mkdir()
                    for number, file in enumerate(files):
                        (folder / f"{number:06}{file.suffix}").symlink_to(file.resolve())
                try:
                    row.figures[name] = metric(*folders)
                    self.report.figures += 1
                except Exception as error:
                    self.report.reasons[method, set_name, name] = self._excuse(error)
                    self.report.faults.append(f"{method}, {set_name}: no {name}: {self._excuse(error)}")
        if row.figures:
            rows[set_name, WHOLE_SET] = row

    def _found(self, test_set: TestSet, method: Method) -> list[Job]:
        """Pictures in the method's folder, and what each belongs to; what is left over goes into the report."""
        folder = method.folders[test_set.name]
        listing = list_pictures(folder)
        self.report.faults += [*listing.skipped]
        if not listing.names:
            self._nothing(method, test_set, f"{folder}: holds no pictures")
            return []
        by_file = {}
        for picture in test_set.pictures.values():
            path = picture.reference or picture.input
            if path is not None:
                by_file[path.name] = picture
        theirs = list(by_file) if by_file else list(listing.names)
        matching = match_names(listing.names, theirs, method.ending)
        where = str(next(iter(test_set.pictures.values())).reference or "the set") if by_file else str(folder)
        where = str(Path(where).parent) if by_file else where
        if matching.doubt or not matching.pairs:
            reason = matching.doubt or f"no picture has the name of one in {where}"
            self._nothing(method, test_set, f"{folder}: {reason}")
            return []
        self.report.faults += [f"{method.name}, {test_set.name}: {x}" for x in left_over(matching, str(folder), where)]
        nothing = Picture(None, None)
        return [
            Job(stem(name), folder / ours, by_file.get(name, nothing)) for name, ours in sorted(matching.pairs.items())
        ]

    def _to_restore(self, test_set: TestSet, method: Method) -> list[Job]:
        jobs = [
            Job(name, self.results.restored_path(method.name, test_set.name, name), picture)
            for name, picture in test_set.pictures.items()
            if picture.input is not None
        ]
        if not jobs:
            self._nothing(method, test_set, f"{test_set.name}: has no low-quality pictures to restore")
        return jobs

    def _nothing(self, method: Method, test_set: TestSet, reason: str) -> None:
        self.report.reasons[method.name, test_set.name, ""] = reason
        self.report.faults.append(f"{method.name}, {test_set.name}: {reason}")

    def _fault(self, job: Job, line: str) -> None:
        known = any(str(path) in line for path in (job.file, *job.picture) if path is not None)
        self.report.faults.append(line if known else f"{job.file}: {line}")

    def _digest(self, path: Path | None) -> str:
        if path is None:
            return ""
        if path not in self._digests:
            self._digests[path] = digest(path)
        return self._digests[path]
