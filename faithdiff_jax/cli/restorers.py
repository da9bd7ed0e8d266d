"""The restorers that flags name, as methods of an evaluation; each is loaded when there is something to restore."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faithdiff_jax.config import from_dict, override, to_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.configuration import MODEL
from faithdiff_jax.evaluation.methods import Method, Restorer
from faithdiff_jax.evaluation.results import digest

if TYPE_CHECKING:
    from faithdiff_jax.inference.pipeline import FaithDiff

BICUBIC = "bicubic"


def model_methods(
    path: Path,
    variants: Mapping[str, Mapping[str, Any]],
    overrides: Sequence[str],
    dtype: str,
    presets: Sequence[str] = (),
) -> list[Method]:
    """A model directory as methods, one for each variant of its options; they share the loaded model.

    Args:
        path: the model directory; for variants that name a model, the folder of those.
        variants: name -> options that differ from the model's defaults; `model` names a folder in `path`.
        overrides: option=value, of all variants; `scale` is the set's.
        dtype: what to compute in.
        presets: names of the model's presets, to take instead of `variants`.

    Raises:
        InputError: not a model directory, or an option or a preset that it does not have.
    """
    from faithdiff_jax.inference.loading import chosen, default_options, preset_options
    from faithdiff_jax.inference.options import RestoreOptions
    from faithdiff_jax.inference.pipeline import FaithDiff
    from faithdiff_jax.weights.model_directory import ModelDirectory

    @functools.cache
    def opened(folder: str) -> ModelDirectory:
        return ModelDirectory.open(path / folder)

    planned: dict[str, tuple[ModelDirectory, str | None, Mapping[str, Any]]]
    planned = {name: (opened(changes.get(MODEL, "")), None, changes) for name, changes in variants.items()}
    if presets:
        planned = {name: (opened(""), name, {}) for name in presets}

    @functools.lru_cache(maxsize=1)  # methods come one after the other
    def model(folder: str) -> "FaithDiff":
        return FaithDiff.load(opened(folder), dtype=None if dtype == "auto" else dtype)

    def load(folder: str, options: RestoreOptions, name: str, scale: float) -> Restorer:
        from faithdiff_jax.baselines.restorer import FaithDiffRestorer

        return FaithDiffRestorer(model(folder), options.replace(scale=scale), name)

    methods = []
    for name, (stored, preset, changes) in planned.items():
        start = default_options(stored) if preset is None else chosen(preset_options(stored), preset)
        given = override({key: value for key, value in changes.items() if key != MODEL}, overrides)
        if "scale" in given:
            raise InputError("scale: is the test set's, give --scale")
        options = from_dict(RestoreOptions, {**to_dict(start), **given}, f"options of {name}")
        options.check_against(stored.config)
        settings = {key: value for key, value in to_dict(options).items() if key != "scale"}
        settings |= {"model": stored.digest, "dtype": dtype}
        methods.append(
            Method(name, load=functools.partial(load, changes.get(MODEL, ""), options, name), settings=settings)
        )
    return methods


def baseline_method(text: str) -> Method:
    """`bicubic`, or NAME=DIR of a model directory that `faithdiff convert --rrdbnet` wrote.

    Raises:
        InputError: neither.
    """
    name, equals, folder = text.partition("=")
    if not equals:
        if name != BICUBIC:
            raise InputError(f"--baseline {text}: must be {BICUBIC}, or NAME=DIR with a model directory of RRDBNet")

        def bicubic(scale: float) -> Restorer:
            from faithdiff_jax.baselines.restorer import Bicubic

            return Bicubic(scale)

        return Method(BICUBIC, load=bicubic, settings={"baseline": BICUBIC})

    from faithdiff_jax.baselines.rrdbnet_weights import RRDBNetDirectory

    RRDBNetDirectory.open(Path(folder))  # a wrong folder is told before any work

    def rrdbnet(scale: float) -> Restorer:
        from faithdiff_jax.baselines.super_resolution import RRDBNetRestorer

        restorer: Restorer = RRDBNetRestorer.load(folder, scale=scale)
        return restorer

    return Method(name, load=rrdbnet, settings={"baseline": digest(Path(folder) / "config.yaml")})
