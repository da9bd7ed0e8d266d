"""The directory of a run: one run at a time writes it, and only a run of the same configuration continues it.

RUN_DIR/config.yaml     format, model (directory, digest), config (TrainConfig, everything resolved)
RUN_DIR/checkpoints/    see `checkpoints`
RUN_DIR/validation/     pictures
RUN_DIR/tensorboard/    scalars
RUN_DIR/.lock           held by the process that writes, until it ends, however it ends; none in an object store
"""

import dataclasses
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator, Mapping
from typing import IO, Any

import yaml

from faithdiff_jax.config import from_dict, load_yaml, merged, to_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.places import is_remote, place, require_reachable, resolved
from faithdiff_jax.files.writing import write_text
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.training.config import FREE_TO_CHANGE, TrainConfig, train_config
from faithdiff_jax.training.run_log import steps_logged
from faithdiff_jax.training.saved_checkpoints import saved_steps
from faithdiff_jax.weights.model_directory import ModelDirectory

FORMAT = 1
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
RESUMES = ("auto", "never", "must")
ABSENT = "absent"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What RUN_DIR/config.yaml says: the configuration, and the model directory that the run started from."""

    config: TrainConfig
    model_dir: pathlib.Path
    digest: str
    """`ModelDirectory.digest` when the run began."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """A run's directory, locked until `close` (or the end of a `with` block) where this process writes it."""

    path: pathlib.Path
    run: Run
    lock: IO[str] | None = None
    """None in processes that only read, and in an object store, which has no locks."""

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of the Orbax checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def validation(self) -> pathlib.Path:
        """The folder of the validation's pictures."""
        return self.path / "validation"

    @property
    def tensorboard(self) -> pathlib.Path:
        """The folder of TensorBoard's scalars."""
        return self.path / "tensorboard"

    def close(self) -> None:
        """Let another run have the directory."""
        if self.lock is not None:
            self.lock.close()

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_run(
    path: pathlib.Path | str,
    config: TrainConfig,
    model: ModelDirectory,
    *,
    resume: str = "auto",
    is_main: bool = True,
) -> RunDirectory:
    """Begin a run in a directory, or continue the one it holds.

    Nothing is written unless everything fits. With several processes, the main one locks and writes and the others
    check what they find; they are to meet afterwards, since only the main one can tell a run of its own from one that
    was there before.

    Args:
        path: RUN_DIR; a new or empty directory begins a run.
        config: the run's configuration, resolved.
        model: the model directory that it starts from.
        resume: "auto" begins or continues, "never" refuses a directory that holds a run, "must" one without a
            checkpoint to resume from.
        is_main: whether this process writes.

    Raises:
        InputError: a directory of something else, one that another run writes to, or one whose run is not to be
            continued, has lost its checkpoints, has another model, or another configuration (every difference is
            named; keys of `FREE_TO_CHANGE` may differ).
    """
    if resume not in RESUMES:
        raise InputError(f"resume is {resume!r}: must be one of {', '.join(RESUMES)}")
    path = place(path)
    require_reachable(path)
    run = Run(config=config, model_dir=resolved(model.source), digest=model.digest)
    _check(path, run, model, resume, is_main)
    if not is_main:
        return RunDirectory(path=path, run=run)
    lock = None if is_remote(path) else _lock(path)
    try:
        # Again, now that nobody else can write.
        if _check(path, run, model, resume, is_main) != run:
            _write_config(path, run)
    except BaseException:
        if lock is not None:
            lock.close()
        raise
    return RunDirectory(path=path, run=run, lock=lock)


def read_run(path: pathlib.Path | str) -> Run:
    """Read what a run is, without a lock: it may be under way.

    Raises:
        InputError: not a run's directory, or one of another format.
    """
    path = place(path)
    require_reachable(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such run directory (train.py makes one)")
    run = _read(path)
    if run is None:
        raise InputError(f"{path}: not a run directory, it has no {CONFIG} (train.py makes one)")
    return run


def is_same_model(model: ModelDirectory, digest: str) -> bool:
    """Whether a directory is the model of a run's digest, or was upgraded from it: the parameters are the same then."""
    was = model.provenance.get("upgraded_from")
    return digest in (model.digest, was.get("digest") if isinstance(was, dict) else None)


def model_config(config: TrainConfig, model: ModelDirectory) -> FaithDiffConfig:
    """The architecture that is trained: the model directory's, with the overrides of `config.model` put in.

    Raises:
        InputError: an override with an unknown key or a value its config refuses.
    """
    if not config.model:
        return model.config
    return from_dict(FaithDiffConfig, merged(to_dict(model.config), config.model), "model")


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, what changed) for every value in which two nested mappings differ."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        if old != new:
            yield prefix, f"{prefix} was {_said(old)}, is {_said(new)}"
        return
    for key in [*old, *(key for key in new if key not in old)]:
        yield from differences(old.get(key, ABSENT), new.get(key, ABSENT), f"{prefix}.{key}" if prefix else str(key))


def _check(path: pathlib.Path, run: Run, model: ModelDirectory, resume: str, is_main: bool) -> Run | None:
    """The run that the directory holds, if `run` may continue it; None if there is none and one may begin."""
    found = _read(path)
    if found is None:
        if resume == "must":
            raise InputError(f"{path}: holds no run to resume (no {CONFIG}); check the path, or leave --resume away")
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: is a file, a directory is needed")
        others = sorted(entry.name for entry in path.iterdir() if not _is_ours(entry.name)) if path.is_dir() else []
        if others:
            raise InputError(f"{path}: not a run's directory, it holds {others[0]}; give a new or an empty one")
        return None
    if resume == "never" and is_main:
        raise InputError(f"{path}: holds a run already; resume it (--resume auto), or give another --output")
    if not is_same_model(model, found.digest):
        raise InputError(
            f"{path}: its run started from {found.model_dir} as it was then; {run.model_dir} is another model "
            f"(its config.yaml has digest {run.digest[:12]}, the run's {found.digest[:12]})"
        )
    refused = [
        change
        for key, change in differences(to_dict(found.config), to_dict(run.config))
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)
    ]
    if refused:
        raise InputError(f"{path}: its run has another configuration: {'; '.join(refused)}; give another --output")
    if resume != "never":
        _check_checkpoints(path, found, resume)
    return found


def _check_checkpoints(path: pathlib.Path, found: Run, resume: str) -> None:
    """Refuse to start a run over that had checkpoints.

    One that was killed before its first was complete may start over, and then takes the same steps again.
    """
    checkpoints = path / CHECKPOINTS
    if saved_steps(checkpoints):
        return
    step, had_checkpoints = steps_logged(path)
    # Every save waits for the one before it, so that at the second the first was complete.
    if (
        had_checkpoints
        or (step and not is_remote(path) and not checkpoints.is_dir())
        or step >= 2 * found.config.checkpoint.every
    ):
        raise InputError(
            f"{path}: its run took {step} steps and its checkpoints are gone from {checkpoints}: put them back, or "
            f"give another --output to start over"
        )
    if resume == "must":
        raise InputError(f"{path}: its run has no checkpoint yet to resume from; leave --resume must away to start it")


def _read(path: pathlib.Path) -> Run | None:
    file = path / CONFIG
    if not file.exists():
        return None
    data = load_yaml(file)
    if "config" not in data:
        raise InputError(f"{path}: not a run's directory, its {CONFIG} is of something else; give a new one")
    if data.get("format") != FORMAT:
        raise InputError(f"{file}: format is {data.get('format')!r}, this version reads format {FORMAT}")
    model, config = data.get("model"), data["config"]
    if not isinstance(model, dict) or model.keys() != {"directory", "digest"} or not isinstance(config, dict):
        raise InputError(f"{file}: damaged, it needs model with directory and digest, and config")
    return Run(
        config=train_config(config, str(file)),
        model_dir=place(str(model["directory"])),
        digest=str(model["digest"]),
    )


def _write_config(path: pathlib.Path, run: Run) -> None:
    """Replace config.yaml: a reader, or a process killed here, finds the old one or the new one."""
    model = {"directory": str(run.model_dir), "digest": run.digest}
    data = {"format": FORMAT, "model": model, "config": to_dict(run.config)}
    write_text(path / CONFIG, yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120))


def _lock(path: pathlib.Path) -> IO[str]:
    """Hold RUN_DIR/.lock; the file stays when the lock goes."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written to ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
    except OSError as error:
        lock.seek(0)
        holder = lock.read() if isinstance(error, BlockingIOError) else ""
        lock.close()
        if isinstance(error, BlockingIOError):
            raise InputError(f"{path}: another run ({holder}) is writing to it; give another --output") from None
        raise InputError(f"{path}: cannot be locked ({error.strerror})") from None
    return lock


def _is_ours(name: str) -> bool:
    """What a run that was killed as it began may have left."""
    return name in (LOCK, f".{CONFIG}.partial") or (name.startswith(".") and name.endswith(".tmp"))


def _said(value: Any) -> str:
    return value if value is ABSENT else json.dumps(value, ensure_ascii=False)
