"""The paper's comparisons at a small size: what was measured of every model, seed and picture, and in what order it is.

configs/tiny/ablations.csv, tableN.yaml --kept_table--> Comparison --markdown--> what `evaluate --table N` prints

A difference is one of pictures: of each, the mean over the seeds, minus that of the table's first method. Its interval
says how far it would move with other photographs; the differences of the seeds, how far with other training. It counts
where both keep to one side of zero.
"""

import csv
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from faithdiff_jax.config import CONFIGS
from faithdiff_jax.errors import InputError, shown
from faithdiff_jax.evaluation.comparison import BICUBIC
from faithdiff_jax.evaluation.configuration import FOLDER, MODEL, EvaluationConfig, load_table
from faithdiff_jax.evaluation.results import WHOLE_SET, Results
from faithdiff_jax.evaluation.statistics import Mean, mean_with_interval
from faithdiff_jax.evaluation.tables import title_of, with_interval
from faithdiff_jax.files.reading import read_text
from faithdiff_jax.files.writing import write_text

METRICS = ("psnr", "lpips")
FIGURES = CONFIGS / "tiny" / "ablations.csv"
JUDGED = "lpips"
"""The metric whose order is compared: the one that the paper gives for every row."""

BySeed = Mapping[int, Mapping[str, Mapping[str, float]]]
"""Seed -> picture -> metric -> figure."""
Figures = Mapping[str, BySeed]
"""Of models and variants."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A method of a comparison.

    Attributes:
        name: of tables.
        seeds: how many models were trained.
        means: metric -> mean over pictures of their means over seeds, with its interval over pictures.
        difference: of LPIPS to the first method's, likewise; None for the first.
        by_seed: that of each seed alone.
        published: the paper's LPIPS, if at hand.
    """

    name: str
    seeds: int
    means: Mapping[str, Mean]
    difference: Mean | None = None
    by_seed: tuple[float, ...] = ()
    published: float | None = None

    @property
    def side(self) -> int:
        """1 if its LPIPS is above the first method's, that is worse, -1 if below, 0 if that cannot be told."""
        if self.difference is None or self.difference.low is None or self.difference.high is None:
            return 0
        sides = {int(np.sign(value)) for value in (self.difference.low, self.difference.high, *self.by_seed)}
        return sides.pop() if len(sides) == 1 else 0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A table of ours beside the paper's order."""

    title: str
    pictures: int
    lines: Sequence[Line]


def kept_tables() -> list[int]:
    """The tables that figures are kept of."""
    found = read_figures(FIGURES)
    numbers = sorted(int(path.stem.removeprefix("table")) for path in (CONFIGS / FOLDER).glob("table*.yaml"))
    keys = {number: keys_of(load_table(f"table{number}")).values() for number in numbers}
    return [number for number in numbers if sum(key in found for key in keys[number]) > 1]


def keys_of(table: EvaluationConfig) -> dict[str, str]:
    """Method of a table -> what its figures are kept under: its model, or the method's name."""
    return {name: str(changes.get(MODEL, name)) for name, changes in table.methods.items()}


def kept_table(number: int, path: Path = FIGURES) -> Comparison:
    """What is kept of a table of the paper.

    Raises:
        InputError: there is no such table, or no figures of it.
    """
    config, figures = load_table(f"table{number}"), read_figures(path)
    keys = keys_of(config)
    there = {name: figures[key] for name, key in keys.items() if key in figures}
    if next(iter(keys)) not in there or len(there) < 2:
        have = ", ".join(map(str, kept_tables())) if path == FIGURES else "others"
        raise InputError(f"table {number}: no figures at the small size are kept of it, only of {have}")
    published = {one.method: one.figures[JUDGED] for one in reversed(config.published) if JUDGED in one.figures}
    first = there[next(iter(keys))]
    lines = [_line(name, theirs, None if theirs is first else first, published.get(name))
             for name, theirs in there.items()]  # fmt: skip
    if BICUBIC in figures:
        lines.append(_line(BICUBIC, figures[BICUBIC], None, None))
    return Comparison(f"{config.title}, at the small size", len(first[min(first)]), lines)


def _line(name: str, theirs: BySeed, first: BySeed | None, published: float | None) -> Line:
    means = {metric: _over_pictures(theirs, metric) for metric in METRICS}
    if first is None:
        return Line(name, len(theirs), means, published=published)
    shared = sorted(theirs.keys() & first.keys())
    apart = {
        seed: {
            picture: {JUDGED: theirs[seed][picture][JUDGED] - first[seed][picture][JUDGED]} for picture in first[seed]
        }
        for seed in shared
    }
    by_seed = tuple(float(np.mean([one[JUDGED] for one in pictures.values()])) for pictures in apart.values())
    return Line(name, len(theirs), means, _over_pictures(apart, JUDGED), by_seed, published)


def _over_pictures(by_seed: BySeed, metric: str) -> Mean:
    pictures = by_seed[min(by_seed)]
    found = mean_with_interval(
        [float(np.mean([seed[picture][metric] for seed in by_seed.values()])) for picture in pictures]
    )
    assert found is not None
    return found


def verdict(line: Line, first: Line) -> str:
    """How a line's place below or above the first compares with the paper's."""
    if line.difference is None or line.published is None or first.published is None:
        return ""
    if not line.side:
        return "cannot be told"
    return "as in the paper" if line.side == np.sign(line.published - first.published) else "against the paper"


def markdown(comparison: Comparison) -> str:
    """The table in Markdown, the paper's LPIPS and whether the order agrees in its last columns."""
    first = comparison.lines[0]
    lines = [
        f"# {comparison.title}",
        "",
        f"| | seeds | {' | '.join(map(title_of, METRICS))} | LPIPS minus that of {first.name} | of each seed "
        "| paper's LPIPS | order |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in comparison.lines:
        apart = "" if line.difference is None else with_interval(JUDGED, line.difference, "+")
        paper = "" if line.published is None else f"{line.published:.4f}"
        cells = [
            line.name,
            "" if line.name == BICUBIC else str(line.seeds),
            *(with_interval(metric, line.means[metric]) for metric in METRICS),
            apart,
            ", ".join(f"{one:+.4f}" for one in line.by_seed),
            paper,
            verdict(line, first),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"{comparison.pictures} test photographs; means with 95 % bootstrap intervals over pictures."]
    return "\n".join([*lines, "", *notes]) + "\n"


def read_figures(path: Path) -> Figures:
    """Read what `write_figures` wrote.

    Raises:
        InputError: it is missing or damaged.
    """
    found: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
    text = read_text(path)
    try:
        for row in csv.DictReader(io.StringIO(text, newline=""), strict=True):
            figures = {name: float(row[name]) for name in METRICS}
            found.setdefault(row["row"], {}).setdefault(int(row["seed"]), {})[row["picture"]] = figures
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged ({shown(str(error))})") from None
    return found


def write_figures(path: Path, results: Results, set_name: str) -> None:
    """Keep the figures of a folder of results: a line for each method and picture, small enough to keep.

    Args:
        path: of the file.
        results: of methods named ROW-SEED, or ROW.
        set_name: the set whose pictures count.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "seed", "picture", *METRICS])
    for method in results.methods:
        row, seed = re.fullmatch(r"(.*?)(?:-(\d+))?", method).groups()  # type: ignore[union-attr]
        for (its, picture), found in sorted(results.rows(method).items()):
            if its == set_name and picture != WHOLE_SET:
                figures = [f"{found.figures[name]:.5g}" for name in METRICS]
                writer.writerow([row, seed or 0, picture, *figures])
    write_text(path, text.getvalue())
