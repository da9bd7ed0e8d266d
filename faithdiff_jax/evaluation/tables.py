"""How well several restorers do on the same pictures, as a table.

(low-quality, reference) pictures -> each restorer -> measures -> means -> Markdown
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from faithdiff_jax.evaluation.metrics import gmsd, psnr, sharpness_ratio, ssim

Picture = UInt8[np.ndarray, "_ _ 3"]

MEASURES: Mapping[str, Callable[[Picture, Picture], float]] = {
    "PSNR": psnr, "SSIM": ssim, "GMSD": gmsd, "sharpness": sharpness_ratio,
}  # fmt: skip
DIGITS = {"PSNR": 2, "SSIM": 4, "GMSD": 4, "sharpness": 2}


class Case(NamedTuple):
    """One picture to restore: `low` (h, w, 3) uint8, its caption, and `reference` (H, W, 3) uint8, the truth."""

    low: Picture
    caption: str
    reference: Picture


Restore = Callable[[Picture, str], Picture]
"""A low-quality picture and its caption -> the restored picture, of the reference's size."""


def evaluate(restorers: Mapping[str, Restore], cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """Restorer -> measure -> its mean over the cases."""
    results = {}
    for name, restore in restorers.items():
        restored = [restore(case.low, case.caption) for case in cases]
        results[name] = {
            title: float(np.mean([measure(ours, case.reference) for ours, case in zip(restored, cases, strict=True)]))
            for title, measure in MEASURES.items()
        }
    return results


def markdown(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A table of `evaluate`'s results by heading (a level of degradation, say): a row for each restorer of each."""
    titles = list(MEASURES)
    lines = [f"| | | {' | '.join(titles)} |", "|---|---|" + "---|" * len(titles)]
    for heading, by_restorer in results.items():
        for name, means in by_restorer.items():
            cells = " | ".join(f"{means[title]:.{DIGITS[title]}f}" for title in titles)
            lines.append(f"| {heading} | {name} | {cells} |")
    return "\n".join(lines)
