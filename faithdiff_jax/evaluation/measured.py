"""Figures of pictures that are compared, as galleries and sheets show them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from faithdiff_jax.evaluation import measuring
from faithdiff_jax.evaluation.comparison import INPUT, REFERENCE, Comparison
from faithdiff_jax.evaluation.measuring import NO_REFERENCE, Metrics
from faithdiff_jax.evaluation.metrics.names import METRICS, MetricInfo, picture_metric_info
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
    for name in metrics:
        picture_metric_info(name)
    made = Metrics.make(metrics, protocol)
    figures: dict[str, dict[str, dict[str, float]]] = {column: {} for column in comparison.columns}
    notes: list[str] = []
    for group in comparison.groups() if made.ready else ():
        columns = [column for column in group.pictures if column != INPUT]
        true = group.pictures.get(REFERENCE)
        found = measuring.measure(
            made,
            [group.pictures[column] for column in columns],
            [None if column == REFERENCE else true for column in columns],
            [{}] * len(columns),
        )
        for column, measurement in zip(columns, found, strict=True):
            figures[column][group.name] = {METRICS[name].title: value for name, value in measurement.figures.items()}
            notes += [
                f"{group.name}, {column}: no {METRICS[name].title}: {reason}"
                for name, reason in measurement.notes.items()
                if reason != NO_REFERENCE
            ]
    shown = [METRICS[name] for name in metrics if name in made.ready]
    return Measured(shown, figures, [*made.unavailable.values(), *notes])
