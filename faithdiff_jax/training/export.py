"""A run -> a model directory, for restoring with what was trained, and from there back to PyTorch.

    the model directory the run started from + a checkpoint of the run -> MODEL_DIR

Everything goes through array by array.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.places import place, resolved
from faithdiff_jax.files.writing import refuse_existing
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import part_names, part_shapes
from faithdiff_jax.training.config import TrainConfig
from faithdiff_jax.training.distillation import exported_defaults
from faithdiff_jax.training.lora import PREFIX, merged
from faithdiff_jax.training.run_directory import CHECKPOINTS, Run, is_same_model, model_config, read_run
from faithdiff_jax.training.saved_checkpoints import load_saved, saved_specs, saved_steps, verify
from faithdiff_jax.weights.from_torch import Track, untracked
from faithdiff_jax.weights.initialisation import fresh_part
from faithdiff_jax.weights.keymap import compare
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.safetensors_format import Spec
from faithdiff_jax.weights.stored_files import CONFIG, Contents

NAMED_AT_MOST = 5

Named = Iterator[tuple[str, np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """The parameters of one checkpoint: the trained ones, or their average."""

    folder: pathlib.Path
    step: int
    kind: str
    """`ema` or `trained`."""
    specs: Mapping[str, Spec]
    """Dotted path, part first -> dtype and shape."""

    def arrays(self, paths: Sequence[str]) -> Iterator[np.ndarray]:
        """Read these, in their order."""
        return (array for _, array in load_saved(self.folder, self.step, [f"{self.kind}/{path}" for path in paths]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Where the parameters of one part come from; all paths are those inside the part."""

    name: str
    trained: tuple[str, ...]
    adapted: tuple[str, ...]
    """Kernels with a LoRA update."""
    stored: tuple[str, ...]
    """All that are not trained, the adapted ones too: as the run began with them."""
    fresh: bool
    """Whether the run began with new ones, and not with the model directory's."""

    @property
    def untouched(self) -> bool:
        """Whether the part is the model directory's, whole."""
        return not self.trained and not self.adapted and not self.fresh


@dataclasses.dataclass(frozen=True)
class Before:
    """The parameters that a run began with: its model directory's, or new ones."""

    run: Run
    model: ModelDirectory
    config: FaithDiffConfig
    """The architecture that is trained."""

    def shapes(self, part: Part) -> dict[str, tuple[int, ...]]:
        """Dotted path -> shape of a part."""
        return part_shapes(self.config, part.name)

    def specs(self, part: Part) -> dict[str, Spec]:
        """Dotted path -> dtype and shape, of what the part began with."""
        if not part.fresh:
            return self.model.specs(part.name)
        return {path: (array.dtype, array.shape) for path, array in self._fresh(part.name).items()}

    def arrays(self, part: Part, paths: Sequence[str]) -> Named:
        """Yield (path, array) of what the part began with, in the dtype it is stored in."""
        if not part.fresh:
            return self.model.arrays(part.name, paths)
        fresh = self._fresh(part.name) if paths else {}
        return ((path, fresh[path]) for path in paths)

    def _fresh(self, part: str) -> dict[str, np.ndarray]:
        return fresh_part(self.config, part, lambda other: dict(self.model.arrays(other)), self.run.config.seed)


def export_run(
    run: pathlib.Path | str,
    output: pathlib.Path | str,
    *,
    ema: bool = True,
    step: int | None = None,
    dtype: Any = None,
    defaults: Mapping[str, Any] | None = None,
    allow_nonfinite: bool = False,
    track: Track = untracked,
) -> Saved:
    """Write the model that a run has trained; the run may be under way.

    Args:
        run: the run's directory.
        output: the model directory; it must not exist, or be empty.
        ema: take the average of the parameters, if the run keeps one.
        step: which checkpoint; None for the newest.
        dtype: of the parameters that were trained, LoRA's kernels among them; None for float32. All others stay as
            they are in the model directory that the run started from.
        defaults: of restoring, in place of those that the model directory has.
        allow_nonfinite: whether parameters may be NaN or infinite.
        track: shows progress.

    Returns:
        What was taken from which checkpoint.

    Raises:
        InputError: not a run, one without the checkpoint or with a damaged one, one whose model directory has gone or
            is another by now, an output that exists, or parameters that are NaN or infinite, by name.
    """
    output = pathlib.Path(output)
    refuse_existing(output)
    stored_run = read_run(run)
    model = ModelDirectory.open(stored_run.model_dir)
    if not is_same_model(model, stored_run.digest):
        raise InputError(f"{model.path}: is not what {run} started from, its {CONFIG} differs by now")
    before = Before(stored_run, model, model_config(stored_run.config, model))
    config = before.config
    saved = _saved(run, ema, step)
    parts = _parts(before, saved)
    dtype = np.dtype(np.float32 if dtype is None else dtype)

    contents = {}
    for part in parts:
        specs, arrays = model.contents(part.name) if part.untouched else _contents(part, before, saved, dtype)
        contents[part.name] = Contents(specs, track(arrays, part.name, len(specs)))
    ModelDirectory.write(
        output,
        config,
        contents,
        tokenizers=model.path,
        provenance=_provenance(run, model, saved, ema, parts),
        defaults={**model.defaults, **exported_defaults(stored_run.config, config, model), **(defaults or {})},
        allow_nonfinite=allow_nonfinite,
    )
    return saved


def _saved(run: pathlib.Path | str, ema: bool, step: int | None) -> Saved:
    folder = place(run) / CHECKPOINTS
    steps = saved_steps(folder)
    if not steps:
        raise InputError(f"{run}: has no checkpoint yet")
    step = steps[-1] if step is None else step
    verify(folder, step)
    specs = saved_specs(folder, step)
    kind = "ema" if ema and any(name.startswith("ema/") for name in specs) else "trained"
    found = {name.removeprefix(f"{kind}/"): spec for name, spec in specs.items() if name.startswith(f"{kind}/")}
    return Saved(folder=folder, step=step, kind=kind, specs=found)


def _parts(before: Before, saved: Saved) -> list[Part]:
    """Where all parameters come from; those that come from nowhere or do not fit are one InputError."""
    run, config = before.run, before.config
    parts, faults = [], []
    unknown = set(saved.specs)
    for name in part_names(config):
        shapes = part_shapes(config, name)
        adapters = {path: tuple(f"{PREFIX}{name}.{path}.{side}" for side in "ab") for path in shapes}
        trained = tuple(path for path in shapes if f"{name}.{path}" in saved.specs)
        adapted = tuple(path for path in shapes if run.config.lora and saved.specs.keys() >= set(adapters[path]))
        unknown -= {f"{name}.{path}" for path in trained} | {side for path in adapted for side in adapters[path]}
        part = Part(
            name=name,
            trained=trained,
            adapted=adapted,
            stored=tuple(path for path in shapes if path not in trained),
            fresh=name in run.config.fresh,
        )
        parts.append(part)
        found = {path: saved.specs[f"{name}.{path}"][1] for path in trained}
        if part.fresh:
            found |= {path: shapes[path] for path in part.stored}
        elif part.stored:
            held = before.model.specs(name)
            found |= {path: held[path][1] for path in part.stored if path in held}
        faults += [f"{name}: {fault}" for fault in compare(shapes, found)]
    faults += [f"unknown {path} {saved.specs[path][1]}" for path in sorted(unknown)]
    if faults:
        more = f" and {len(faults) - NAMED_AT_MOST} more" * (len(faults) > NAMED_AT_MOST)
        raise InputError(
            f"{saved.folder / str(saved.step)}: does not fit {run.model_dir}: {'; '.join(faults[:NAMED_AT_MOST])}{more}"
        )
    return parts


def _contents(part: Part, before: Before, saved: Saved, dtype: np.dtype) -> Contents:
    """What trained, the adapted kernels with their updates, and the rest as stored."""
    kept = [path for path in part.stored if path not in part.adapted]
    specs = {path: (dtype, before.shapes(part)[path]) for path in (*part.trained, *part.adapted)}
    specs |= {path: before.specs(part)[path] for path in kept}

    def arrays() -> Named:
        trained = saved.arrays([f"{part.name}.{path}" for path in part.trained])
        for path, array in zip(part.trained, trained, strict=True):
            yield path, array.astype(dtype)
        sides = saved.arrays([f"{PREFIX}{part.name}.{path}.{side}" for path in part.adapted for side in "ab"])
        for path, kernel in before.arrays(part, part.adapted):
            a, b = next(sides), next(sides)
            yield path, merged(kernel.astype(np.float32), a, b, _lora_scale(before.run.config)).astype(dtype)
        yield from before.arrays(part, kept)

    return Contents(specs, arrays())


def _lora_scale(config: TrainConfig) -> float:
    return 1.0 if config.lora is None else config.lora.alpha / config.lora.rank


def _provenance(
    run: pathlib.Path | str, model: ModelDirectory, saved: Saved, ema: bool, parts: Sequence[Part]
) -> dict[str, Any]:
    """What config.yaml says of the export, and what it said of the model directory before."""
    parameters = "ema" if saved.kind == "ema" else "trained (the run keeps no EMA)" if ema else "trained"
    return {
        "run": {
            "directory": str(resolved(run)),
            "step": saved.step,
            "parameters": parameters,
            "parts": [part.name for part in parts if not part.untouched],
        },
        "model": {"directory": str(model.path), "provenance": model.provenance},
    }
