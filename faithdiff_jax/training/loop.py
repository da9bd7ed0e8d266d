"""A training run from its configuration to its last checkpoint.

    checks, on shapes alone -> run directory -> loader, parameters or checkpoint -> step after step -> checkpoints,
    scalars, validation pictures

Everything that can be wrong with the input is found before parameters are read. Whatever ends a run, its directory
holds a whole checkpoint to resume from, bit for bit as if it had not stopped.
"""

import contextlib
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from faithdiff_jax.data.loader import BatchIterator
from faithdiff_jax.data.workers import WorkerError
from faithdiff_jax.errors import InputError, RunError
from faithdiff_jax.files.places import place
from faithdiff_jax.planning import flops
from faithdiff_jax.sharding import placed_shapes
from faithdiff_jax.training.checkpoints import Checkpoints, named_leaves
from faithdiff_jax.training.config import TrainConfig
from faithdiff_jax.training.distillation import DistillStep
from faithdiff_jax.training.optimizer import Flat
from faithdiff_jax.training.parameters import (
    check_finite,
    inference_params,
    load_parameters,
    model_shapes,
    not_finite,
    trained_shapes,
)
from faithdiff_jax.training.preparation import abstract_arrays, placed_batch, prepare, step_flops
from faithdiff_jax.training.profile import Profile
from faithdiff_jax.training.reporting import Watch, timed
from faithdiff_jax.training.run_directory import RunDirectory, open_run
from faithdiff_jax.training.step import State, TrainStep
from faithdiff_jax.training.stopping import DataWait, StopSignals, Watchdog
from faithdiff_jax.training.validation import Validation
from faithdiff_jax.weights.model_directory import ModelDirectory

log = logging.getLogger("faithdiff_jax")

# How many steps are done, and the metrics of the last of them.
Reported = tuple[int, dict[str, jax.Array]]


def train(
    config: TrainConfig,
    model_dir: pathlib.Path | str,
    output: pathlib.Path | str,
    *,
    resume: str = "auto",
    profile: pathlib.Path | None = None,
) -> int:
    """Begin or resume a run, and train to its last step or until the process is told to stop (SIGTERM, SIGINT).

    Args:
        config: the run.
        model_dir: the model directory that it starts from.
        output: the run's directory.
        resume: see `run_directory.open_run`.
        profile: folder for a profile of a few steps, see `profile.Profile`.

    Returns:
        How many steps are done: `config.steps`, or less if it was told to stop.

    Raises:
        InputError: something about the input is wrong, or the disk or the data failed on the way.
        RunError: too many steps in a row were not finite.
        KeyboardInterrupt: told to stop before the first step, when there is nothing to save.
    """
    with StopSignals() as stop:
        return _train(config, place(model_dir), output, resume, Profile(profile), stop)


def _train(
    config: TrainConfig,
    model_dir: pathlib.Path,
    output: pathlib.Path | str,
    resume: str,
    profile: Profile,
    stop: StopSignals,
) -> int:
    is_main = jax.process_index() == 0
    prepared = prepare(config, model_dir)
    stored, step, mesh = prepared.stored, prepared.step, prepared.mesh

    with contextlib.ExitStack() as open_:
        directory = open_.enter_context(open_run(output, config, stored, resume=resume, is_main=is_main))
        _meet("the run's directory is open")
        checkpoints = Checkpoints(directory.checkpoints, config.checkpoint)
        open_.callback(checkpoints.close)
        batches = open_.enter_context(iter(prepared.loader))
        with timed("reading the parameters"):
            state, frozen = _start(step, stored, checkpoints, batches)
        first = int(state["step"])
        if first:
            log.info("resumed at step %d of %d", first, config.steps)
        if first >= config.steps:
            return first
        watch = open_.enter_context(
            Watch(
                config.watch,
                directory.path,
                steps=config.steps,
                first_step=first,
                batch=config.batch,
                flops_per_step=step_flops(step, prepared.shapes) if _peak_is_known(config) else None,
                devices=mesh.size,
                is_main=is_main,
            )
        )
        open_.callback(profile.close)
        run = _Run(step, frozen, batches, checkpoints, watch, prepared.validation, directory, profile)
        stop.running = True
        return run.go(state, first, stop)


def _peak_is_known(config: TrainConfig) -> bool:
    return bool(config.watch.peak_tflops or flops.peak_tflops(jax.local_devices()[0]))


def _start(
    step: TrainStep, stored: ModelDirectory, checkpoints: Checkpoints, batches: BatchIterator
) -> tuple[State, Flat]:
    """The state to begin or resume with, of the model directory or the latest checkpoint; and the frozen parameters."""
    latest = checkpoints.latest_step()
    if latest is None:
        return initial_state(step, stored)
    _, frozen = _parameters(step, stored, only_frozen=True)
    shapes = trained_shapes(step.config, model_shapes(step.model), step.labels)
    abstract = jax.eval_shape(step.init, abstract_arrays(shapes, jnp.float32))
    state, data = checkpoints.restore(latest, placed_shapes(abstract, step.shardings(abstract)))
    check_finite(named_leaves(state), checkpoints.folder / str(latest))
    batches.set_state(data)
    return state, frozen


def initial_state(step: TrainStep, stored: ModelDirectory) -> tuple[State, Flat]:
    """The state of a new run from its model directory, on the step's mesh, and the frozen parameters."""
    trained, frozen = _parameters(step, stored, only_frozen=False)
    check_finite(trained, stored.path)
    shardings = step.shardings(jax.eval_shape(step.init, trained))
    return jax.jit(step.init, out_shardings=shardings, donate_argnums=0)(trained), frozen


def _parameters(step: TrainStep, stored: ModelDirectory, *, only_frozen: bool) -> tuple[Flat, Flat]:
    """Trained and frozen ones; of the first, with `only_frozen`, no more than `load_parameters` gives."""
    assert step.mesh is not None
    trained, frozen = load_parameters(step.config, stored, step.model, step.labels, step.mesh, only_frozen=only_frozen)
    if isinstance(step, DistillStep):
        frozen |= step.teacher_parameters(stored)
    check_finite(frozen, stored.path)
    return trained, frozen


class _Run:
    """The steps of a run, between its start and its end."""

    def __init__(
        self,
        step: TrainStep,
        frozen: Flat,
        batches: BatchIterator,
        checkpoints: Checkpoints,
        watch: Watch,
        validation: Validation | None,
        directory: RunDirectory,
        profile: Profile,
    ):
        self.profile = profile
        self.step, self.frozen, self.batches = step, frozen, batches
        self.checkpoints, self.watch, self.validation, self.directory = checkpoints, watch, validation, directory
        self.config = step.config
        self.watchdog, self.data_wait = Watchdog(self.config.step_timeout), DataWait()
        self._logged = 0  # the last step that was

    def go(self, state: State, first: int, stop: StopSignals) -> int:
        """Take steps from `first` on; returns how many are done in all, the last of them saved."""
        config, done = self.config, first
        unreported: Reported | None = None
        position = self.batches.get_state()
        try:
            while done < config.steps and not stop.at(done):
                compiles = done == first  # however long that takes
                with contextlib.nullcontext() if compiles else self.watchdog.over(f"step {done + 1}"):
                    batch = self._batch()
                    position = self.batches.get_state()
                    self.profile.before()
                    with timed("compiling the training step") if compiles else contextlib.nullcontext():
                        state, metrics = self.step.run(state, self.frozen, batch)
                    self.profile.after(metrics)
                    done += 1
                    # The step before this one is reported while this one is computed.
                    before, unreported = unreported, (done, metrics)
                    self._report(before)
                if self.checkpoints.due(done):
                    self._log(unreported)  # first: a kill between the two would leave a gap in the log
                    self._save(done, state, position)
                self._note_saved()
                if self.validation is not None and done % self.validation.config.every == 0:
                    self._validate(done, state)
            before, unreported = unreported, None
            self._report(before)
        except (InputError, WorkerError):
            # The data failed, or the disk: what is done is kept if it can be. Other processes would not come to save.
            if jax.process_count() == 1:
                with contextlib.suppress(InputError, RunError):
                    self._report(unreported)
                with contextlib.suppress(InputError, RunError):
                    self._save(done, state, position)
                    self.checkpoints.wait()
            raise
        if done > first:
            self._save(done, state, position)
            self.checkpoints.wait()
            self._note_saved()
        return done

    def _save(self, step: int, state: State, position: dict[str, Any]) -> None:
        """Begin to save a state, if it is one that a run can resume from."""
        faults = not_finite(named_leaves(state))
        if faults:
            raise RunError(
                f"step {step}: NaN or infinite values in {faults}; this step was not saved, and what "
                f"{self.directory.checkpoints} holds is intact"
            )
        self.checkpoints.save(step, state, position)

    def _note_saved(self) -> None:
        """Say in the log that a checkpoint is on disk, or end the run as soon as one could not be written."""
        step = self.checkpoints.finished()
        if step is not None:
            self.watch.saved(step)

    def _batch(self) -> dict[str, jax.Array]:
        assert self.step.mesh is not None
        with self.data_wait.measured():
            batch = next(self.batches)
        return placed_batch(batch, self.step.mesh, self.config.batch)

    def _report(self, reported: Reported | None) -> None:
        """Log a step, and end the run if too many in a row were not finite."""
        if reported is None:
            return
        self._log(reported)
        step, metrics = reported
        bad = int(metrics["skipped_in_a_row"])
        if bad >= self.config.stop_after_bad_steps:
            raise RunError(
                f"step {step}: loss or gradients were not finite {bad} times in a row; none of "
                f"these steps was applied, and what {self.directory.checkpoints} holds is intact"
            )

    def _log(self, reported: Reported | None) -> None:
        """Log a step, if it has not been."""
        if reported is None or reported[0] <= self._logged:
            return
        self._logged, metrics = reported
        waited = self.data_wait.shared() if self._logged % self.config.watch.every == 0 else {}
        values = jax.device_get(metrics)
        scalars = {name: value if value.ndim else value.item() for name, value in values.items()}
        self.watch.update(self._logged, scalars | waited)

    def _validate(self, step: int, state: State) -> None:
        assert self.validation is not None
        with self.watch.pause():
            scores, picture = self.validation.run(inference_params(self.config, state, self.frozen))
            self.watch.validation(step, scores, picture)


def _meet(name: str) -> None:
    """Wait for the other processes, if there are any."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
