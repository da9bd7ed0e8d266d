"""A table of a paper as configuration: its sets, the variants of the model, the protocol, and the published figures."""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from faithdiff_jax.config import Range, check_ranges, config_names, find_config, load, shown
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.metrics.names import metric_info
from faithdiff_jax.evaluation.protocols import find_protocol
from faithdiff_jax.evaluation.results import check_name
from faithdiff_jax.evaluation.tables import RESOURCES, Published
from faithdiff_jax.evaluation.testsets import SCALE

FOLDER = "evaluation"
"""In configs/: where the paper's tables are."""
MODEL = "model"
"""In a table's methods: the folder of the model that restores, where each has one of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetConfig:
    """A test set of a table."""

    folder: str
    """Within the folder of data; of methods' pictures, within theirs."""
    scale: float = SCALE
    limit: int | None = None
    """Only this many pictures, the first by name."""
    crop: int | None = None
    """Only the middle of each input, this many pixels on a side."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            scale=Range(0, 32, above=True),
            limit=Range(1, 1_000_000, whole=True, optional=True),
            crop=Range(2, 16_384, whole=True, optional=True),
        )
        if not self.folder or self.folder.startswith("/") or ".." in PurePosixPath(self.folder).parts:
            raise ValueError(f"folder is {shown(self.folder)}: must be a path within the folder of data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """A table: what is restored and measured, and what is printed beside it."""

    title: str
    protocol: str = "paper"
    metrics: tuple[str, ...] = ()
    """Columns, also "seconds" and "memory"; the protocol's if empty."""
    sets: Mapping[str, SetConfig]
    methods: Mapping[str, Mapping[str, Any]]
    """Variants of the model: name -> what differs from its default options; and `model`, where each is a model of its
    own, its folder in the folder of models."""
    published: tuple[Published, ...] = ()
    notes: tuple[str, ...] = ()
    """Lines below the table."""

    def __post_init__(self) -> None:
        find_protocol(self.protocol)
        for name in self.metrics:
            if name not in RESOURCES:
                metric_info(name)
        if not self.sets or not self.methods:
            raise ValueError("sets or methods is empty: a table needs at least one of each")
        for name in self.sets:
            _check_key(name, "set")
        for name, changes in self.methods.items():
            _check_key(name, "method")
            if MODEL in changes:
                _check_key(changes[MODEL], "model of a method,")
        for one in self.published:
            if one.set not in self.sets:
                raise ValueError(f"published: {shown(one.set)} is none of the sets ({', '.join(self.sets)})")
            unknown = [name for name in one.figures if name not in self.metrics]
            if unknown:
                raise ValueError(f"published: {shown(unknown[0])} is none of the metrics ({', '.join(self.metrics)})")


def load_table(name: str) -> EvaluationConfig:
    """Read a table's configuration: one of the package by its name, such as `table1`, or a file.

    Raises:
        InputError: there is neither, or it is not one of a table.
    """
    names = [known.removeprefix(f"{FOLDER}/") for known in config_names() if known.startswith(f"{FOLDER}/")]
    if name in names:
        return load(EvaluationConfig, find_config(f"{FOLDER}/{name}"))
    if name.endswith((".yaml", ".yml")):
        return load(EvaluationConfig, name)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"the tables are {', '.join(names)}, or a YAML file"
    raise InputError(f"no table {shown(name)}; {hint}")


def _check_key(name: object, what: str) -> None:
    if not isinstance(name, str):
        raise ValueError(f"{what} {shown(name)}: its name must be text")
    check_name(name, what)
