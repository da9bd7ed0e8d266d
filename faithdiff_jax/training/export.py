"""A run -> a model directory, for restoring with what was trained, and from there back to PyTorch.

    the model directory the run started from + a checkpoint of the run -> MODEL_DIR

Parts of which nothing was trained are copied file by file; the others go through array by array.
"""

import dataclasses
import math
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from faithdiff_jax._version import __version__
from faithdiff_jax.config import load_yaml
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.writing import refuse_existing, whole
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import numbered, part_names, part_shapes
from faithdiff_jax.training.checkpoints import load_saved, saved_specs, saved_steps
from faithdiff_jax.training.config import TrainConfig
from faithdiff_jax.training.lora import PREFIX, merged
from faithdiff_jax.training.run_directory import Run, model_config, model_digest, read_run
from faithdiff_jax.weights import model_directory
from faithdiff_jax.weights.from_torch import Track, untracked
from faithdiff_jax.weights.initialisation import fresh_part
from faithdiff_jax.weights.keymap import compare

NAMED_AT_MOST = 5

Named = Iterator[tuple[str, np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """The parameters of one checkpoint: the trained ones, or their average."""

    folder: pathlib.Path
    step: int
    kind: str
    """`ema` or `trained`."""
    specs: Mapping[str, model_directory.Spec]
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


def export_run(
    run: pathlib.Path | str,
    output: pathlib.Path | str,
    *,
    ema: bool = True,
    step: int | None = None,
    dtype: Any = None,
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
        track: shows progress.

    Returns:
        What was taken from which checkpoint.

    Raises:
        InputError: not a run, one without the checkpoint, one whose model directory has gone or is another by now, or
            an output that exists.
    """
    output = pathlib.Path(output)
    refuse_existing(output)
    stored_run = read_run(run)
    model_dir = stored_run.model_dir
    if model_digest(model_dir) != stored_run.digest:
        raise InputError(f"{model_dir}: is not what {run} started from, its {model_directory.CONFIG} differs by now")
    config = model_config(stored_run.config, model_dir)
    saved = _saved(run, ema, step)
    parts = _parts(stored_run, config, saved)
    dtype = np.dtype(np.float32 if dtype is None else dtype)

    shapes = {part.name: part_shapes(config, part.name) for part in parts}
    size = sum(4 * math.prod(shape) for part_shapes in shapes.values() for shape in part_shapes.values())
    with whole(output, size) as target:
        (target / "params").mkdir(parents=True)
        for part in parts:
            if part.untouched:
                shutil.copytree(model_dir / "params" / part.name, target / "params" / part.name)
            else:
                arrays = _arrays(part, stored_run, config, saved, dtype)
                model_directory.save_part(target, part.name, track(arrays, part.name, len(shapes[part.name])))
        for name in numbered("tokenizer", len(config.text_encoders)):
            shutil.copytree(model_dir / name, target / name)
        model_directory.write_config(target, config, _provenance(run, stored_run, saved, ema, parts))
    return saved


def _saved(run: pathlib.Path | str, ema: bool, step: int | None) -> Saved:
    folder = pathlib.Path(run) / "checkpoints"
    steps = saved_steps(folder)
    if not steps:
        raise InputError(f"{run}: has no checkpoint yet")
    step = steps[-1] if step is None else step
    specs = saved_specs(folder, step)
    kind = "ema" if ema and any(name.startswith("ema/") for name in specs) else "trained"
    found = {name.removeprefix(f"{kind}/"): spec for name, spec in specs.items() if name.startswith(f"{kind}/")}
    return Saved(folder=folder, step=step, kind=kind, specs=found)


def _parts(run: Run, config: FaithDiffConfig, saved: Saved) -> list[Part]:
    """Where all parameters come from; those that come from nowhere or do not fit are one InputError."""
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
            held = model_directory.stored(run.model_dir, name)
            found |= {path: held[path][1] for path in part.stored if path in held}
        faults += [f"{name}: {fault}" for fault in compare(shapes, found)]
    faults += [f"unknown {path} {saved.specs[path][1]}" for path in sorted(unknown)]
    if faults:
        more = f" and {len(faults) - NAMED_AT_MOST} more" * (len(faults) > NAMED_AT_MOST)
        raise InputError(
            f"{saved.folder / str(saved.step)}: does not fit {run.model_dir}: {'; '.join(faults[:NAMED_AT_MOST])}{more}"
        )
    return parts


def _arrays(part: Part, run: Run, config: FaithDiffConfig, saved: Saved, dtype: np.dtype) -> Named:
    """A part's (path, array): what was trained, the adapted kernels with their updates, and the rest as stored."""
    arrays = saved.arrays([f"{part.name}.{path}" for path in part.trained])
    for path, array in zip(part.trained, arrays, strict=True):
        yield path, array.astype(dtype)
    sides = saved.arrays([f"{PREFIX}{part.name}.{path}.{side}" for path in part.adapted for side in "ab"])
    for path, kernel in _stored(part, run, config, part.adapted):
        a, b = next(sides), next(sides)
        yield path, merged(kernel.astype(np.float32), a, b, _lora_scale(run.config)).astype(dtype)
    yield from _stored(part, run, config, [path for path in part.stored if path not in part.adapted])


def _stored(part: Part, run: Run, config: FaithDiffConfig, paths: Sequence[str]) -> Named:
    """Parameters as the run began with them, in the dtype they are stored in."""
    if not part.fresh or not paths:
        return model_directory.load_arrays(run.model_dir, part.name, paths)
    vae = dict(model_directory.load_arrays(run.model_dir, "vae", part_shapes(config, "vae")))
    arrays = fresh_part(config, part.name, vae, run.config.seed)
    return ((path, arrays[path]) for path in paths)


def _lora_scale(config: TrainConfig) -> float:
    return 1.0 if config.lora is None else config.lora.alpha / config.lora.rank


def _provenance(
    run: pathlib.Path | str, stored_run: Run, saved: Saved, ema: bool, parts: Sequence[Part]
) -> dict[str, Any]:
    """What config.yaml says of the export, and what it said of the model directory before."""
    parameters = "ema" if saved.kind == "ema" else "trained (the run keeps no EMA)" if ema else "trained"
    model = load_yaml(stored_run.model_dir / model_directory.CONFIG)
    return {
        "package": f"faithdiff-jax {__version__}",
        "run": {
            "directory": str(pathlib.Path(run).absolute()),
            "step": saved.step,
            "parameters": parameters,
            "parts": [part.name for part in parts if not part.untouched],
        },
        "model": {"directory": str(stored_run.model_dir), "provenance": model.get("provenance")},
    }
