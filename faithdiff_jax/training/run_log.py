"""A run's log: one JSON object per line, each of a step; what earlier runs in the folder wrote is read and cut."""

import contextlib
import io
import itertools
import json
import pathlib
from typing import IO, cast

from faithdiff_jax.files.places import is_remote
from faithdiff_jax.files.writing import write_text

LOG = "metrics.jsonl"
CHECKPOINT = '"checkpoint"'  # as the log has it


def steps_logged(folder: pathlib.Path) -> tuple[int, bool]:
    """The last step that a run's log has a line of (0 for none), and whether it says that a checkpoint was saved."""
    lines = _lines(folder / LOG)
    return max((step for step, _ in lines), default=0), any(CHECKPOINT in line for _, line in lines)


def drop_after(path: pathlib.Path, step: int) -> None:
    """Cut from the log what is of later steps, or was cut short itself when a run was killed.

    A run that starts over keeps the log of the one before it under another name.
    """
    lines = _lines(path)
    if step == 0 and lines:
        numbers = itertools.count(1)
        path.rename(next(name for n in numbers if not (name := path.with_stem(f"{path.stem}-{n}")).exists()))
    elif path.exists():
        write_text(path, "".join(f"{line}\n" for number, line in lines if number <= step))


def open_log(path: pathlib.Path) -> IO[str]:
    """Open a log to append lines to, each written when it is flushed; a remote one is written anew each time."""
    return cast(IO[str], _RemoteLog(path)) if is_remote(path) else path.open("a", encoding="utf-8")


class _RemoteLog(io.StringIO):
    """Nothing can be appended to an object of a store."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self._path = path
        super().write(path.read_text() if path.is_file() else "")

    def flush(self) -> None:
        write_text(self._path, self.getvalue())


def _lines(path: pathlib.Path) -> list[tuple[int, str]]:
    """(step, line) for every whole line of a log."""
    lines = []
    for line in path.read_bytes().decode(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            lines.append((int(json.loads(line)["step"]), line))
    return lines
