"""A picture on its way through the service."""

import dataclasses
import enum
import pathlib
import time
from typing import Any

from faithdiff_jax.files.captions import Caption
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.service.forms import public


class JobState(enum.StrEnum):
    """Where a job is; the last four are final."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    HANDED_BACK = "handed back"
    """The service stopped before its turn came: it is to be sent again, to this service or another."""


FINAL = frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED, JobState.HANDED_BACK})


@dataclasses.dataclass(kw_only=True, eq=False)
class Job:
    """A request and what has become of it; changed by `JobQueue` and the worker alone.

    Attributes:
        id: that nobody guesses: who knows it may see and cancel the job.
        source: the file that was sent, checked, in the private folder.
        target: where the result goes.
        name: what whoever sent it calls the picture.
        size: its height and width.
        alike: what it must have in common with another to be in its batch: options but for the seed, padded size.
        together: as many are a batch.
        state: see there.
        step: steps done.
        steps: that there are.
        code: exit code that the command would end with, of one that failed.
        error: of one that failed, in one line.
        notes: a short sentence for each thing that was done to the picture.
        preview: JPEG of what it looked like after `preview_step`.
        preview_wanted: whether somebody asks for a newer one.
        stopped: whether it is to end at the next step.
        shown: files of it that the page shows.
        fetched: whether somebody has the result.
        since: when it came into its state, in seconds of `time.monotonic`.
    """

    id: str
    source: pathlib.Path
    target: pathlib.Path
    name: str
    size: tuple[int, int]
    caption: Caption
    options: RestoreOptions
    alike: Any
    together: int
    state: JobState = JobState.WAITING
    step: int = 0
    steps: int = 0
    code: int = 0
    error: str | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    preview: bytes | None = None
    preview_step: int = 0
    preview_wanted: bool = False
    stopped: bool = False
    shown: list[pathlib.Path] = dataclasses.field(default_factory=list)
    fetched: bool = False
    since: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def final(self) -> bool:
        """Whether nothing more will become of it."""
        return self.state in FINAL

    def described(self, place: int | None) -> dict[str, Any]:
        """As plain data, for whoever sent it; `place` is that in the queue."""
        return {
            "id": self.id,
            "state": str(self.state),
            "place": place,
            "step": self.step,
            "steps": self.steps,
            "preview_step": self.preview_step,
            "error": self.error,
            "name": self.name,
            "width": self.size[1],
            "height": self.size[0],
            "caption": self.caption if isinstance(self.caption, str) else list(self.caption),
            "options": public(self.options),
            "notes": list(self.notes),
        }

    def remove_files(self) -> None:
        """Remove what the private folder has of it."""
        self.source.unlink(missing_ok=True)
        for path in (self.target, *self.shown):
            path.unlink(missing_ok=True)
        self.preview = None
