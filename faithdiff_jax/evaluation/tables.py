"""Results as tables: means with intervals, the best in bold, published figures beside ours with the difference.

results --summarise--> Summary --> JSON, Markdown, LaTeX
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from faithdiff_jax.config import to_dict
from faithdiff_jax.evaluation.measuring import NO_REFERENCE
from faithdiff_jax.evaluation.metrics.names import METRICS, MetricInfo
from faithdiff_jax.evaluation.results import WHOLE_SET, Results, Row
from faithdiff_jax.evaluation.statistics import SEED, Mean, mean_with_interval

RESOURCES = {
    "seconds": MetricInfo(title="s a picture", digits=2, better="lower", needs_reference=False),
    "memory": MetricInfo(title="peak MiB", digits=0, better="lower", needs_reference=False),
}
"""What is measured of a restorer, not of a picture."""
EMPTY = "-"


@dataclass(frozen=True)
class Published:
    """Figures of a paper: of a method on a set."""

    set: str
    method: str
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Line:
    """A row of a table: a method on a set."""

    set: str
    method: str
    pictures: int
    means: Mapping[str, Mean | None]
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why there is no mean, by metric."""


@dataclass(frozen=True)
class Summary:
    """Everything a table is made of."""

    metrics: Sequence[str]
    lines: Sequence[Line]
    published: Sequence[Published] = ()
    title: str = ""
    notes: Sequence[str] = ()


def info_of(name: str) -> MetricInfo:
    """What is known of a column."""
    return RESOURCES[name] if name in RESOURCES else METRICS[name]


def summarise(
    results: Results,
    metrics: Sequence[str],
    sets: Sequence[str],
    *,
    used: Mapping[tuple[str, str], Collection[str]] | None = None,
    reasons: Mapping[tuple[str, str, str], str] | None = None,
    published: Sequence[Published] = (),
    seed: int = SEED,
) -> Summary:
    """Means over the pictures of every method that there are results of.

    Args:
        results: measured, in this run or before.
        metrics: columns.
        sets: in their order; others that results have are left out.
        used: the pictures that count, by (method, set); None for all that there are.
        reasons: why (method, set, metric) has no figure; "" as method or set stands for all.
        published: figures to set beside them.
        seed: of the intervals.
    """
    lines = []
    for set_name in sets:
        for method in results.methods:
            stored = results.rows(method)
            names = {picture for its, picture in stored if its == set_name}
            if used is not None:
                names &= set(used.get((method, set_name), ()))
            rows = [stored[set_name, picture] for picture in sorted(names - {WHOLE_SET})]
            whole = stored.get((set_name, WHOLE_SET), Row())
            means: dict[str, Mean | None] = {}
            why: dict[str, str] = {}
            for name in metrics:
                if name == "memory":
                    peak = results.peaks.get(method)
                    means[name] = None if peak is None or not rows else Mean(peak.mebibytes, None, None, 1)
                elif info_of(name).over_folders:
                    figure = whole.figures.get(name)
                    means[name] = None if figure is None else Mean(figure, None, None, len(rows))
                else:
                    values = [row.seconds if name == "seconds" else row.figures.get(name) for row in rows]
                    means[name] = mean_with_interval([value for value in values if value is not None], seed)
                if means[name] is None:
                    compares = info_of(name).needs_reference and bool(rows) and not any(row.reference for row in rows)
                    why[name] = NO_REFERENCE if compares else _reason(reasons or {}, method, set_name, name)
            lines.append(Line(set_name, method, len(rows), means, why))
    return Summary(metrics, lines, published)


def _reason(reasons: Mapping[tuple[str, str, str], str], method: str, set_name: str, metric: str) -> str:
    for key in ((method, set_name, metric), (method, set_name, ""), (method, "", metric), ("", "", metric)):
        if key in reasons:
            return reasons[key]
    return "no figures"


def as_json(summary: Summary) -> dict[str, Any]:
    """The summary as plain data: set -> method -> metric -> mean, low, high, count, or the reason for none."""
    sets: dict[str, dict[str, Any]] = {}
    for line in summary.lines:
        figures = {
            name: {"reason": line.reasons[name]} if mean is None else to_dict(mean) for name, mean in line.means.items()
        }
        sets.setdefault(line.set, {})[line.method] = {"pictures": line.pictures, "metrics": figures}
    published = [{"set": one.set, "method": one.method, "figures": dict(one.figures)} for one in summary.published]
    return {"metrics": list(summary.metrics), "sets": sets, "published": published}


@dataclass(frozen=True)
class _Cell:
    text: str
    best: bool = False


def _grid(summary: Summary) -> list[tuple[str, str, str, list[_Cell]]]:
    """Rows of cells: set, name, pictures, and a cell for each metric; published figures and differences after ours."""
    rows = []
    sets = list(dict.fromkeys(line.set for line in summary.lines))
    for set_name in sets:
        lines = [line for line in summary.lines if line.set == set_name]
        best = {name: _best(name, lines) for name in summary.metrics}
        for line in lines:
            cells = [
                _Cell(with_interval(name, line.means[name]), line.method in best[name]) for name in summary.metrics
            ]
            rows.append((set_name, line.method, str(line.pictures), cells))
            for one in summary.published:
                if (one.set, one.method) == (line.set, line.method):
                    rows += _beside(summary, line, one)
        for one in summary.published:
            if one.set == set_name and all(one.method != line.method for line in lines):
                cells = [_Cell(_plain(name, one.figures.get(name))) for name in summary.metrics]
                rows.append((set_name, f"{one.method}, published", "", cells))
    return rows


def _beside(summary: Summary, line: Line, one: Published) -> list[tuple[str, str, str, list[_Cell]]]:
    published, difference = [], []
    for name in summary.metrics:
        theirs, ours = one.figures.get(name), line.means[name]
        published.append(_Cell(_plain(name, theirs)))
        if theirs is None or ours is None:
            difference.append(_Cell(EMPTY))
        else:
            difference.append(_Cell(_plain(name, ours.mean - theirs, "+")))
    return [
        (line.set, f"{line.method}, published", "", published),
        (line.set, "difference", "", difference),
    ]


def _best(name: str, lines: Sequence[Line]) -> set[str]:
    """The methods whose mean is the best as it is printed; none where there is only one."""
    digits, better = info_of(name).digits, info_of(name).better
    means = {line.method: round(mean.mean, digits) for line in lines if (mean := line.means[name]) is not None}
    if len(means) < 2:
        return set()
    worth = {
        method: mean if better == "higher" else -mean if better == "lower" else -abs(mean - 1)
        for method, mean in means.items()
    }
    return {method for method, value in worth.items() if value == max(worth.values())}


def _plain(name: str, value: float | None, sign: str = "") -> str:
    return EMPTY if value is None else f"{value:{sign}.{info_of(name).digits}f}"


def with_interval(name: str, mean: Mean | None, sign: str = "") -> str:
    """A mean with its interval as a cell of the column has them; `sign` is "+" for a difference."""
    if mean is None:
        return EMPTY
    text = _plain(name, mean.mean, sign)
    return text if mean.low is None else f"{text} [{_plain(name, mean.low, sign)}, {_plain(name, mean.high, sign)}]"


def title_of(name: str) -> str:
    """A column's title with an arrow, as text: which way is better."""
    return info_of(name).title + {"higher": " ↑", "lower": " ↓", "one": " → 1"}[info_of(name).better]


def markdown(summary: Summary) -> str:
    """A table in Markdown; means with their intervals, the best in bold, and why cells are empty below."""
    titles = list(map(title_of, summary.metrics))
    lines = [f"# {summary.title}", ""] if summary.title else []
    lines += [f"| set | method | pictures | {' | '.join(titles)} |", "|---|---|---|" + "---|" * len(titles)]
    for set_name, name, count, cells in _grid(summary):
        shown = " | ".join(f"**{cell.text}**" if cell.best else cell.text for cell in cells)
        lines.append(f"| {set_name} | {name} | {count} | {shown} |")
    lines += [""] + [f"{EMPTY} {reason}" for reason in _reasons(summary)]
    return "\n".join([*lines, *summary.notes]).rstrip() + "\n"


def latex(summary: Summary) -> str:
    """The table for LaTeX with booktabs, without intervals; the best in bold."""
    marks = {"higher": r" $\uparrow$", "lower": r" $\downarrow$", "one": r" $\to 1$"}
    titles = [_escaped(info_of(name).title) + marks[info_of(name).better] for name in summary.metrics]
    lines = [r"\begin{tabular}{ll" + "r" * len(titles) + "}", r"\toprule"]
    lines += [" & ".join(["Set", "Method", *titles]) + r" \\"]
    before = None
    for set_name, name, _, cells in _grid(summary):
        if set_name != before:
            lines.append(r"\midrule")
        texts = [cell.text.partition(" [")[0] for cell in cells]
        shown = [rf"\textbf{{{text}}}" if cell.best else text for text, cell in zip(texts, cells, strict=True)]
        lines.append(" & ".join([_escaped(set_name) if set_name != before else "", _escaped(name), *shown]) + r" \\")
        before = set_name
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _reasons(summary: Summary) -> list[str]:
    """Why cells are empty: a line per reason, with the metrics and methods that it concerns."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in summary.lines:
        for name, reason in line.reasons.items():
            concerned = found.setdefault(reason, {}).setdefault(info_of(name).title, [])
            concerned.append(f"{line.method} on {line.set}")
    lines = []
    for reason, by_title in found.items():
        concerned = sorted({one for all_ in by_title.values() for one in all_})
        where = "" if len(concerned) == len(summary.lines) else f" ({', '.join(concerned)})"
        lines.append(f"{', '.join(by_title)}{where}: {reason}")
    if summary.published and any(set(summary.metrics) - set(one.figures) for one in summary.published):
        lines.append("in a published row: the figure is not at hand")
    return lines


def _escaped(text: str) -> str:
    special = {character: f"\\{character}" for character in "&%$#_{}"} | {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    }  # fmt: skip
    return "".join(special.get(character, character) for character in text)
