"""Checkpoints of a run: written while training goes on, whole or not at all, and restored onto any mesh.

FOLDER/<step>/    one Orbax checkpoint of the flat state {"trained/unet.conv_in.kernel": array, ...}, the position in
                  the data as JSON beside it, and the SHA-256 of every file in `checksums.json`

The state is stored by the names of its leaves, so that optax's types are no part of the format, and so that an export
finds parameters without knowing the optimiser. A checkpoint is written under another name, hashed, and renamed when all
of it is there; the ones that the policy no longer keeps are removed after that. Whoever reads one checks it first.
In an object store, which cannot rename, it has its name from the start, and Orbax's `commit_success.txt` at the end.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.places import is_remote, remove_tree, resolved
from faithdiff_jax.training import checksums
from faithdiff_jax.training.config import CheckpointConfig
from faithdiff_jax.training.saved_checkpoints import (
    UNFINISHED,
    load_state,
    metadata_of,
    quiet,
    reason,
    refuse_damaged,
    saved_steps,
    unfinished,
)

# A slow disk is no failure: Orbax gives up after this long.
SAVE_SECONDS = 4 * 3600


class Checkpoints:
    """The checkpoints of the run that this process is part of; every process of the run calls every method.

    Args:
        folder: RUN_DIR/checkpoints, made where it is missing; what a save that was cut short left there is removed.
        config: when to save, and what to keep.

    Raises:
        InputError: a folder that cannot be written to, or a checkpoint whose metadata is damaged.
    """

    def __init__(self, folder: pathlib.Path | str, config: CheckpointConfig):
        self.folder = resolved(folder)
        self._config = config
        self._saving_step: int | None = None
        self._saved_step: int | None = None
        self._open = contextlib.ExitStack()
        self._open.enter_context(quiet())
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(config.latest)]
        kept += [] if config.keep_every is None else [policies.EveryNSteps(config.keep_every)]
        context = ocp.Context()
        context.array.saving.use_compression = False  # random mantissas shrink by 8 %, at four times the time
        context.asynchronous.timeout_secs = SAVE_SECONDS
        # In the thread that writes, of the main process, when all processes have written and before the rename. Orbax
        # copies the context: a function stays what it is, a method would be copied with its object.
        context.asynchronous.post_finalization_callback = lambda: self._seal()
        try:
            self._remove_unfinished()
            self._orbax = ocp.training.Checkpointer(
                self.folder, context=context, preservation_policy=policies.AnyPreservationPolicy(kept)
            )
        except OSError as error:
            self._open.close()
            raise InputError(f"{self.folder}: cannot be written to ({error.strerror or error})") from None
        except Exception:
            # Orbax reads the metadata of all checkpoints, and raises whatever its reader does where one is damaged.
            self._open.close()
            for step in reversed(saved_steps(self.folder)):
                refuse_damaged(self.folder, step, metadata_of)
            raise

    def due(self, step: int) -> bool:
        """Whether the policy asks for a checkpoint after `step` steps."""
        return step % self._config.every == 0

    def save(self, step: int, state: Any, data: Mapping[str, Any]) -> None:
        """Begin to save; returns once the arrays may be overwritten or donated. A step that is saved already is left.

        Args:
            step: how many steps the state has seen.
            state: a pytree of arrays.
            data: plain JSON values, the same in every process.

        Raises:
            InputError: this save, or the one before it, failed; earlier checkpoints are intact.
        """
        with self._saving():
            self._wait()
            if step in self.steps():
                return
            if not is_remote(self.folder) and not self.folder.is_dir():
                raise FileNotFoundError("the folder has vanished")
            self._saving_step = step
            self._orbax.save_checkpointables_async(
                step,
                {"state": named_leaves(state)},
                force=True,
                custom_metadata={"data": dict(data), "checksums": checksums.MANIFEST},
            )

    def wait(self) -> None:
        """Return once the last save is on disk.

        Raises:
            InputError: it failed; earlier checkpoints are intact.
        """
        with self._saving():
            self._wait()

    def finished(self) -> int | None:
        """The step whose save has ended since the last call, or None; does not wait.

        With several processes, that is noticed at the next save, where they meet.

        Raises:
            InputError: the save failed; earlier checkpoints are intact.
        """
        if self._saving_step is not None and jax.process_count() == 1 and not self._orbax.is_saving_in_progress():
            self.wait()
        step, self._saved_step = self._saved_step, None
        return step

    def steps(self) -> list[int]:
        """The steps that are saved, ascending; one that is being saved counts."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def latest_step(self) -> int | None:
        """The newest step that is saved, or None."""
        return max(self.steps(), default=None)

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Read a checkpoint, each array straight onto its devices.

        Args:
            step: one of `steps`.
            abstract_state: the state's pytree with a `jax.ShapeDtypeStruct` with a sharding for every array; the mesh
                need not be the one that saved.

        Returns:
            The state, and the `data` that was saved with it.

        Raises:
            InputError: no such checkpoint, one whose arrays are not those of the state (the first few are named), or
                a damaged one (the newest older one that is whole is named).
        """
        wanted = named_leaves(abstract_state)
        arrays, data = refuse_damaged(self.folder, step, lambda folder, step: load_state(folder, step, wanted))
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in wanted]), data

    def close(self) -> None:
        """Wait for the last save and end.

        Raises:
            InputError: that save failed; earlier checkpoints are intact.
        """
        with self._open, self._saving():
            try:
                self._wait()
            finally:
                self._orbax.close()

    def _wait(self) -> None:
        self._orbax.wait()
        if self._saving_step is None:
            return
        self._saved_step, self._saving_step = self._saving_step, None
        if jax.process_index() == 0:
            checksums.complete_checksums(self.folder / str(self._saved_step))

    def _seal(self) -> None:
        """Write the checksums of the checkpoint that is about to get its name."""
        name = str(self._saving_step) if is_remote(self.folder) else UNFINISHED.replace("*", str(self._saving_step))
        checksums.write_checksums(self.folder / name)

    def _remove_unfinished(self) -> None:
        """Give back the space of saves that were cut short."""
        if jax.process_index() == 0:
            for path in unfinished(self.folder):
                remove_tree(path)

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """What a save raises, here or in the threads that write, is an InputError."""
        try:
            yield
        except Exception as error:
            self._saving_step = None
            with contextlib.suppress(Exception):
                self._orbax.reload()  # forget the step that failed
            with contextlib.suppress(OSError):
                self._remove_unfinished()
            intact = f"step {self.latest_step()} is intact" if self.steps() else "there is no earlier one"
            raise InputError(f"{self.folder}: a checkpoint cannot be written ({reason(error)}); {intact}") from None


def named_leaves(tree: Any) -> dict[str, Any]:
    """Name of each leaf -> leaf, in the order of `jax.tree.leaves`: "trained/unet.conv_in.kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
