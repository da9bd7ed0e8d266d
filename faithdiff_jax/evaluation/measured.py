"""Figures of pictures that are compared, as galleries and sheets show them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.comparison import INPUT, REFERENCE, Comparison, Group
from faithdiff_jax.evaluation.metrics import Metric, Unavailable, make_metric
from faithdiff_jax.evaluation.metrics.names import MetricInfo
from faithdiff_jax.evaluation.protocols import Protocol, find_protocol

Figures = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Column -> picture -> title of the metric -> figure; what there is none of is left out."""


@dataclass(frozen=True)
class Measured:
    """Metrics and their figures; columns and pictures are named as in the `Comparison`.

    Attributes:
        infos: the metrics, in the order in which they are shown.
        figures: see `Figures`.
        notes: why some are missing, a line each.
    """

    infos: Sequence[MetricInfo] = ()
    figures: Figures = field(default_factory=dict)
    notes: Sequence[str] = ()

    def of(self, column: str, name: str) -> list[float | None]:
        """The figures of one picture, in the order of `infos`."""
        figures = self.figures.get(column, {}).get(name, {})
        return [figures.get(info.title) for info in self.infos]


def measure(comparison: Comparison, metrics: Sequence[str], protocol: Protocol | str = "paper") -> Measured:
    """Compute metrics of every method's pictures; those that need no reference, of the references too.

    What cannot be computed, of one picture or at all, is left out with a note.

    Raises:
        InputError: there is no such metric or protocol, or the metric compares folders.
    """
    protocol = find_protocol(protocol) if isinstance(protocol, str) else protocol
    made, notes = [], []
    for name in metrics:
        try:
            made.append(make_metric(name, protocol))
        except Unavailable as error:
            notes.append(str(error))
    figures: dict[str, dict[str, dict[str, float]]] = {column: {} for column in comparison.columns}
    if made:
        for group in comparison.groups():
            for column in group.pictures:
                figures[column][group.name], reasons = _of_picture(group, column, made)
                notes += reasons
    return Measured([metric.info for metric in made], figures, notes)


def _of_picture(group: Group, column: str, metrics: Sequence[Metric]) -> tuple[dict[str, float], list[str]]:
    figures, notes = {}, []
    reference = group.pictures.get(REFERENCE)
    for metric in metrics:
        compares = metric.info.needs_reference
        if column == INPUT or (compares and (reference is None or column == REFERENCE)):
            continue
        try:
            figures[metric.info.title] = metric(group.pictures[column], reference if compares else None)
        except InputError as error:
            notes.append(f"{group.name}, {column}: no {metric.info.title}: {error}")
    return figures, notes
