"""Frames of a video: what of their colours flickers is smoothed over the frames around each.

    every frame -> mean and deviation of its channels -> average over neighbours -> tint of its colour fix

What is averaged is of the frames as they come, and of a few around each, so that a frame is restored the same wherever
a run begins or ends, and whatever is restored beside it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, UInt8

from faithdiff_jax.errors import InputError
from faithdiff_jax.files import images
from faithdiff_jax.inference.color import Tint, level_counts, level_statistics


class Colors(NamedTuple):
    """Mean and standard deviation of each channel, of values in [-1, 1]."""

    mean: Float64[np.ndarray, " c"]
    deviation: Float64[np.ndarray, " c"]


def colors_of(frame: UInt8[np.ndarray, "h w c"]) -> Colors:
    """Those of a frame (H, W, C)."""
    return Colors(*level_statistics(level_counts(frame)))


def smoothing_tint(around: Sequence[Colors | None]) -> Tint:
    """What gives a frame the average colours of those around it.

    Args:
        around: from the frame `radius` places before to the one `radius` places after, itself in the middle; None for
            one that there is not, at an end for instance.

    Returns:
        The tint. Weights fall in a straight line from the middle to 0 at radius + 1 places, and are divided by the sum
        of those that there are. A flicker of period p frames is left sin^2(pi n / p) / (n sin(pi / p))^2 of its size,
        n = radius + 1, and is never turned around.

    Raises:
        ValueError: there is no frame in the middle of `around`.
    """
    radius = len(around) // 2
    own = around[radius] if len(around) % 2 else None
    if own is None:
        raise ValueError("around: must have the frame itself in its middle")
    weights = {place: 1 - abs(place - radius) / (radius + 1) for place, one in enumerate(around) if one is not None}
    total = sum(weights.values())
    mean, deviation = (
        sum(weight * each[part] for place, weight in weights.items() if (each := around[place]) is not None) / total
        for part in range(2)
    )
    gain = deviation / own.deviation
    return Tint(gain.astype(np.float32), (mean - own.mean * gain).astype(np.float32))


class Frames:
    """The frames of a folder, each of which is read a second time for its neighbours' sake."""

    def __init__(self, sources: Sequence[Path], radius: int):
        """Take the files, in order, and over how many on either side colours are smoothed."""
        self._sources, self._radius = sources, radius
        self._places = {source: place for place, source in enumerate(sources)}
        self._known: dict[Path, Colors | None] = {}

    def tint(self, source: Path, frame: UInt8[np.ndarray, "h w c"]) -> Tint:
        """What smooths the colours of a frame (H, W, C); may be asked for on several threads."""
        self._known[source] = colors_of(frame)
        place = self._places[source]
        around = range(place - self._radius, place + self._radius + 1)
        return smoothing_tint([self._colors(i) if 0 <= i < len(self._sources) else None for i in around])

    def _colors(self, place: int) -> Colors | None:
        """None for a frame that cannot be read, which the others do without."""
        source = self._sources[place]
        if source not in self._known:
            try:
                self._known[source] = colors_of(images.load_image(source).rgb)
            except InputError:
                self._known[source] = None
        return self._known[source]
