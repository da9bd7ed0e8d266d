"""Means with their intervals as a picture: SVG, a panel for each metric, a line for each method.

Summary or Comparison --> panels of bars --svg--> text of the file
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from faithdiff_jax.evaluation.ablations import JUDGED, Comparison
from faithdiff_jax.evaluation.metrics.names import METRICS
from faithdiff_jax.evaluation.statistics import Mean
from faithdiff_jax.evaluation.tables import Summary, title_of

OURS, THEIRS = "#c8102e", "#1f5fa8"
LINE, PANEL, GAP, HEAD, FOOT = 24, 260, 28, 30, 34
LETTER = 6.3  # pixels, about, of a letter of this size


@dataclass(frozen=True)
class Bar:
    """A line of a panel: a mean with its interval, single figures, and another's figure; each if there is one."""

    mean: Mean | None
    dots: tuple[float, ...] = ()
    other: float | None = None


@dataclass(frozen=True)
class Panel:
    """What stands side by side: a bar for each name, None for an empty line."""

    title: str
    bars: Sequence[Bar]
    zero: bool = False
    """Whether a line at zero is drawn."""


def of_summary(summary: Summary) -> tuple[list[str], list[Panel]]:
    """The names and panels of a table: every column that has figures; published figures as the other's."""
    several = len({line.set for line in summary.lines}) > 1
    names = [f"{line.set}, {line.method}" if several else line.method for line in summary.lines]
    panels = []
    for metric in summary.metrics:
        if any(line.means[metric] for line in summary.lines):
            published = {(one.set, one.method): one.figures.get(metric) for one in summary.published}
            bars = [Bar(line.means[metric], (), published.get((line.set, line.method))) for line in summary.lines]
            panels.append(Panel(title_of(metric), bars))
    return names, panels


def of_comparison(comparison: Comparison) -> tuple[list[str], list[Panel]]:
    """PSNR, and LPIPS minus the first method's with each seed's and the paper's."""
    first = comparison.lines[0]
    apart = [
        Bar(line.difference, line.by_seed, None if None in (line.published, first.published) else
            (line.published or 0) - (first.published or 0))
        for line in comparison.lines
    ]  # fmt: skip
    psnr = [Bar(line.means["psnr"]) for line in comparison.lines]
    title = f"{METRICS[JUDGED].title} minus {first.name}'s (right: worse)"
    return [line.name for line in comparison.lines], [Panel(title, apart, zero=True), Panel(title_of("psnr"), psnr)]


def svg(names: Sequence[str], panels: Sequence[Panel]) -> str:
    """The text of an SVG file.

    Args:
        names: of the lines, from the top.
        panels: side by side, each with a bar for each name.
    """
    left = int(LETTER * max(map(len, names), default=0)) + 20
    width, bottom = left + len(panels) * (PANEL + GAP), HEAD + LINE * len(names)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + FOOT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{bottom + FOOT}" fill="white"/>',
    ]
    for number, name in enumerate(names):
        parts.append(f'<text x="6" y="{HEAD + LINE * number + 16}">{html.escape(name)}</text>')
    for number, panel in enumerate(panels):
        parts += _panel(panel, left + number * (PANEL + GAP), bottom)
    return "\n".join([*parts, "</svg>\n"])


def _panel(panel: Panel, left: int, bottom: int) -> list[str]:
    values = [value for bar in panel.bars for value in _values(bar)] + [0.0] * panel.zero
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.06 * (high - low) or 0.5
    low, high = low - margin, high + margin

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * PANEL

    parts = [f'<text x="{left}" y="18">{html.escape(panel.title)}</text>',
             f'<path d="M{left} {bottom}H{left + PANEL}" stroke="black"/>']  # fmt: skip
    if panel.zero:
        parts.append(f'<path d="M{x(0):.1f} {HEAD}V{bottom}" stroke="#999999" stroke-dasharray="3 3"/>')
    for share in (0.1, 0.5, 0.9):
        value = low + share * (high - low)
        parts.append(f'<text x="{x(value):.1f}" y="{bottom + 16}" text-anchor="middle">{value:.3g}</text>')
    for number, bar in enumerate(panel.bars):
        y = HEAD + LINE * number + 12
        if bar.mean is not None:
            if bar.mean.low is not None and bar.mean.high is not None:
                parts.append(f'<path d="M{x(bar.mean.low):.1f} {y}H{x(bar.mean.high):.1f}" stroke="{OURS}"/>')
            parts.append(f'<circle cx="{x(bar.mean.mean):.1f}" cy="{y}" r="4" fill="{OURS}"/>')
        parts += [f'<circle cx="{x(dot):.1f}" cy="{y + 7}" r="1.8" fill="{OURS}"/>' for dot in bar.dots]
        if bar.other is not None:
            at = x(bar.other)
            parts.append(f'<path d="M{at:.1f} {y - 5}l5 5l-5 5l-5 -5z" fill="none" stroke="{THEIRS}"/>')
    return parts


def _values(bar: Bar) -> list[float]:
    mean = bar.mean
    own = [] if mean is None else [value for value in (mean.mean, mean.low, mean.high) if value is not None]
    return [*own, *bar.dots, *([] if bar.other is None else [bar.other])]
