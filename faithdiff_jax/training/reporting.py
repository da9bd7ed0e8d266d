"""What a run shows of itself: a progress bar, scalars and pictures for TensorBoard and W&B, and one plain log file.

    metrics of each step --mean over an interval--> RUN_DIR/metrics.jsonl, RUN_DIR/tensorboard/, W&B
    validation ----------------------------------> the same, and RUN_DIR/validation/STEP.png

Everything is written at once and by the caller's thread: a full disk is found out where it can be told, and a killed
run has lost nothing but the interval it was in.
"""

import contextlib
import json
import logging
import math
import pathlib
import threading
import time
import types
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.images import save_image
from faithdiff_jax.files.places import is_remote, place, reached
from faithdiff_jax.planning.flops import peak_tflops
from faithdiff_jax.training.config import WatchConfig
from faithdiff_jax.training.events import Events
from faithdiff_jax.training.run_log import LOG, drop_after, open_log

log = logging.getLogger("faithdiff_jax")

STILL_EVERY = 20.0  # seconds
BUCKETS, BUCKET = 10, 100
PER_SAMPLE = ("losses", "timesteps")
SMOOTHING = 0.05
"""Weight of the newest step in the bar's loss."""


class Watch:
    """Reports on a run; a context manager. A process that is not the main one does nothing.

    Steps are numbered by how many have been taken: the first step of a new run is 1, the last one `steps`. What
    earlier runs in this folder wrote of steps after `first_step`, the one that is resumed from, is dropped; a run that
    starts over moves their log aside.
    """

    def __init__(
        self,
        config: WatchConfig,
        folder: pathlib.Path | str,
        *,
        steps: int,
        first_step: int,
        batch: int,
        flops_per_step: float | None,
        devices: int,
        is_main: bool,
    ):
        """Check what can be checked; nothing is written before the `with`.

        Args:
            config: what to report where.
            folder: the run's.
            steps: of the whole run.
            first_step: steps that were taken before, by a run that this one continues; 0 for a new one.
            batch: images a step, over all devices.
            flops_per_step: a step's model FLOPs (`flops.count`) for the utilisation, None to leave it out.
            devices: how many share a step.
            is_main: whether this process is the one that reports.

        Raises:
            InputError: a W&B project is named and W&B is not installed.
        """
        self._config = config
        self._folder = place(folder)
        self._steps, self._first = steps, first_step
        self._batch = batch
        peak = config.peak_tflops or peak_tflops(jax.local_devices()[0])
        self._utilisation: float | None = None  # at one step a second
        if peak is not None and flops_per_step is not None:
            self._utilisation = flops_per_step / (devices * peak * 1e12)
        self._is_main = is_main
        self._wandb: Any = None if config.wandb_project is None else _import_wandb(config.wandb_project)
        self._open = contextlib.ExitStack()
        self._bar: tqdm[Any] | None = None
        self._events: Events | None = None
        self._run: Any = None
        self._interval = _Interval()
        self._last = first_step
        self._smoothed: float | None = None
        self._since: float | None = None
        self._timed = 0
        self._per_second: float | None = None

    def __enter__(self) -> "Watch":
        if not self._is_main:
            return self
        with _writing(self._folder), contextlib.ExitStack() as stack:
            self._folder.mkdir(parents=True, exist_ok=True)
            drop_after(self._folder / LOG, self._first)
            self._log = stack.enter_context(open_log(self._folder / LOG))
            if self._config.tensorboard:
                self._events = Events(self._folder / "tensorboard", self._first)
                stack.callback(self._events.close)
            if self._wandb is not None:
                self._run = self._start_wandb()
            self._bar = stack.enter_context(tqdm(total=self._steps, initial=self._first, unit="step", smoothing=0.1))
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: types.TracebackType | None) -> None:
        if not self._is_main:
            return
        try:
            if kind is None and self._interval.steps:
                self._write_interval(self._last)
            if kind is None:
                with _writing(self._folder):
                    self._open.close()
        finally:
            # After an error, closing must not put another one in its place.
            with contextlib.suppress(OSError):
                self._open.close()
            if self._run is not None:
                self._run.finish(exit_code=0 if kind is None else 1)

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take in a step's metrics, and write an interval's when it is over.

        Args:
            step: how many steps have been taken, this one included.
            metrics: on the host: "loss", "gradient_norm", "gradient_norm/GROUP", "learning_rate/GROUP" (floats),
                "skipped", "skipped_in_a_row" (ints so far), and of the step's samples "losses" (B,) and "timesteps"
                (B,) in 0..999. What is not finite does not go into a mean.

        Raises:
            InputError: the log cannot be written.
            ValueError: steps out of order.
        """
        if not self._last < step <= self._steps:
            raise ValueError(f"step is {step}: must be from {self._last + 1} to {self._steps}")
        self._last = step
        if not self._is_main:
            return
        self._interval.add(metrics)
        # The first step compiles, so the clock starts when it is done.
        if self._since is None:
            self._since = time.perf_counter()
        else:
            self._timed += 1
            self._per_second = self._timed / max(time.perf_counter() - self._since, 1e-9)
        if step % self._config.every == 0 or step == self._steps:
            self._write_interval(step)
        self._show(metrics)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave what is done inside, a validation say, out of images a second and utilisation."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._since is not None:
                self._since += time.perf_counter() - start

    def validation(self, step: int, scores: Mapping[str, float], picture: np.ndarray) -> None:
        """Write a validation's scores, under "validation/", and its picture (H, W, 3) uint8.

        Raises:
            InputError: the log or the picture cannot be written.
        """
        if not self._is_main:
            return
        scalars = {f"validation/{name}": value for name, value in scores.items()}
        self._write(step, scalars)
        with _writing(self._folder):
            (self._folder / "validation").mkdir(parents=True, exist_ok=True)
            save_image(self._folder / "validation" / f"{step:08}.png", picture)
            if self._events is not None:
                self._events.picture("validation/pictures", picture, step)
        if self._run is not None:
            self._run.log({"step": step, "validation/pictures": self._wandb.Image(picture)})
        tqdm.write(f"step {step}: validation {', '.join(f'{name} {value:.4g}' for name, value in scores.items())}")

    def saved(self, step: int) -> None:
        """Note in the log that the checkpoint of a step is on disk: a later run that does not find it will know.

        Raises:
            InputError: the log cannot be written.
        """
        if self._is_main:
            with _writing(self._folder):
                self._log.write(json.dumps({"step": step, "checkpoint": True}) + "\n")
                self._log.flush()

    def _show(self, metrics: Mapping[str, Any]) -> None:
        assert self._bar is not None
        loss = float(metrics["loss"])
        if math.isfinite(loss):
            self._smoothed = loss if self._smoothed is None else self._smoothed + SMOOTHING * (loss - self._smoothed)
        shown = {} if self._smoothed is None else {"loss": f"{self._smoothed:.4f}"}
        rates = [f"{value:.1e}" for name, value in metrics.items() if name.startswith("learning_rate/")]
        shown["rate"] = ",".join(dict.fromkeys(rates))
        if metrics.get("skipped"):
            shown["skipped"] = str(metrics["skipped"])
        if self._per_second is not None:
            shown["images/s"] = f"{self._per_second * self._batch:.3g}"
            if self._utilisation is not None:
                shown["MFU"] = f"{self._per_second * self._utilisation:.1%}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def _write_interval(self, step: int) -> None:
        scalars = self._interval.scalars()
        if self._timed and self._per_second is not None:
            scalars["images_per_second"] = self._per_second * self._batch
            if self._utilisation is not None:
                scalars["mfu"] = self._per_second * self._utilisation
        self._since, self._timed = time.perf_counter(), 0
        self._interval = _Interval()
        self._write(step, scalars)

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
        with _writing(self._folder):
            self._log.write(json.dumps({"step": step, **finite}) + "\n")
            self._log.flush()
            if self._events is not None:
                self._events.scalars(finite, step)
        if self._run is not None:
            self._run.log({"step": step, **finite})

    def _start_wandb(self) -> Any:
        """Begin a W&B run, or go on with the folder's own."""
        name = self._folder / "wandb_id.txt"
        if self._first == 0 or not name.is_file():
            name.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        run = self._wandb.init(
            project=self._config.wandb_project,
            name=self._folder.resolve().name,
            dir=None if is_remote(self._folder) else str(self._folder),
            id=name.read_text(encoding="utf-8").strip(),
            resume="allow",
        )
        # W&B's own counter only rises, which a run that went back to a checkpoint does not.
        run.define_metric("*", step_metric="step")
        return run


class _Interval:
    """Sums over some steps."""

    def __init__(self) -> None:
        self.steps = 0
        self._sums: dict[str, tuple[float, int]] = {}
        self._latest: dict[str, float] = {}
        self._bucket_sums, self._bucket_counts = np.zeros(BUCKETS), np.zeros(BUCKETS)

    def add(self, metrics: Mapping[str, Any]) -> None:
        self.steps += 1
        for name, value in metrics.items():
            if name in PER_SAMPLE:
                continue
            if name.startswith(("skipped", "learning_rate/")):
                self._latest[name] = float(value) if name.startswith("learning_rate/") else int(value)
            elif math.isfinite(value):
                total, number = self._sums.get(name, (0.0, 0))
                self._sums[name] = total + float(value), number + 1
        if not all(name in metrics for name in PER_SAMPLE):
            return
        losses, timesteps = (np.asarray(metrics[name]) for name in PER_SAMPLE)
        finite = np.isfinite(losses)
        np.add.at(self._bucket_sums, timesteps[finite] // BUCKET, losses[finite])
        np.add.at(self._bucket_counts, timesteps[finite] // BUCKET, 1)

    def scalars(self) -> dict[str, float]:
        """Means, what counters and rates came to, and the mean loss of each bucket of timesteps that occurred."""
        scalars = {name: total / number for name, (total, number) in self._sums.items()}
        scalars |= self._latest
        for i in np.flatnonzero(self._bucket_counts):
            name = f"loss_by_timestep/{i * BUCKET:03}-{(i + 1) * BUCKET - 1:03}"
            scalars[name] = float(self._bucket_sums[i] / self._bucket_counts[i])
        return scalars


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Log what is being done, how long it has taken so far every `STILL_EVERY` seconds, and how long it took."""
    log.info("%s", what)
    start, done = time.perf_counter(), threading.Event()

    def still() -> None:
        while not done.wait(STILL_EVERY):
            log.info("%s: %.0f s so far", what, time.perf_counter() - start)

    thread = threading.Thread(target=still, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    log.info("%s: done in %.1f s", what, time.perf_counter() - start)


def _import_wandb(project: str) -> Any:
    try:
        import wandb
    except ImportError:
        raise InputError(
            f"watch.wandb_project is {project!r}: needs the package wandb, which is not installed (pip install wandb)"
        ) from None
    return wandb


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
    try:
        with reached(folder):
            yield
    except OSError as error:
        file = error.filename or folder
        raise InputError(f"{file}: the run's log cannot be written ({error.strerror or error})") from error
