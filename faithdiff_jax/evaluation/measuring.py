"""Metrics of a few pictures at once: what one of them cannot give is a note, never the end of a run."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.metrics import Metric, Unavailable, make_folder_metric, make_metric
from faithdiff_jax.evaluation.metrics.names import metric_info
from faithdiff_jax.evaluation.metrics.pictures import Picture
from faithdiff_jax.evaluation.protocols import Protocol

NO_REFERENCE = "no reference"


@dataclass
class Metrics:
    """The metrics of a run.

    Attributes:
        ready: those that can be computed of a picture, by name.
        folders: those that compare folders, by name.
        unavailable: why others cannot, by name.
    """

    ready: dict[str, Metric] = field(default_factory=dict)
    folders: dict[str, Callable[[Path, Path], float]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, names: Sequence[str], protocol: Protocol) -> "Metrics":
        """Prepare metrics by their names.

        Raises:
            InputError: there is no such metric.
        """
        found = cls()
        for name in names:
            try:
                if metric_info(name).over_folders:
                    found.folders[name] = make_folder_metric(name)
                else:
                    found.ready[name] = make_metric(name, protocol)
            except Unavailable as error:
                found.unavailable[name] = str(error)
        return found


@dataclass
class Measurement:
    """Figures of one picture by metric, and why others are missing."""

    figures: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def measure(
    metrics: Metrics,
    pictures: Sequence[Picture],
    references: Sequence[Picture | None],
    known: Sequence[Mapping[str, float]],
) -> list[Measurement]:
    """Compute metrics of pictures, each (H, W, 3) uint8 with its reference or None.

    Args:
        metrics: those to compute; one that turns out to be unavailable is moved there.
        pictures: restored.
        references: one for each, or None.
        known: figures that each picture has already; they are not computed again.
    """
    found = [Measurement() for _ in pictures]
    for name, metric in list(metrics.ready.items()):
        todo = [index for index in range(len(pictures)) if name not in known[index]]
        if metric.info.needs_reference:
            for index in todo:
                if references[index] is None:
                    found[index].notes[name] = NO_REFERENCE
            todo = [index for index in todo if references[index] is not None]
        groups = [todo] if todo else []
        while groups:
            group = groups.pop()
            ours = [pictures[index] for index in group]
            theirs = [picture for index in group if (picture := references[index]) is not None]
            try:
                figures = metric.many(ours, theirs if metric.info.needs_reference else None)
            except Unavailable as error:
                metrics.unavailable[name] = str(error)
                del metrics.ready[name]
                break
            except InputError as error:
                if len(group) == 1:
                    found[group[0]].notes[name] = str(error)
                else:  # one of them: which, and the others' figures, is found by taking them one by one
                    groups += [[index] for index in group]
                continue
            for index, figure in zip(group, figures, strict=True):
                if math.isfinite(figure):
                    found[index].figures[name] = figure
                else:
                    found[index].notes[name] = f"is {figure}"
    return found
