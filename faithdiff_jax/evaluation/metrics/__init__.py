"""Metrics of restored pictures: what there is is in `names`, what a protocol fixes in `evaluation.protocols`.

name, protocol --make_metric--> Metric --(restored, reference or None)--> float

The names below are loaded when they are first asked for: listing the metrics imports no JAX and no OpenCV.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from faithdiff_jax.evaluation.metrics.edges import gmsd, sharpness_ratio
    from faithdiff_jax.evaluation.metrics.fidelity import psnr, ssim
    from faithdiff_jax.evaluation.metrics.metric import Metric, make_folder_metric, make_metric
    from faithdiff_jax.evaluation.metrics.names import METRICS, SMALLEST_SIDE, MetricInfo, Unavailable

__all__ = [
    "METRICS", "SMALLEST_SIDE", "Metric", "MetricInfo", "Unavailable", "gmsd", "make_folder_metric", "make_metric",
    "psnr", "sharpness_ratio", "ssim",
]  # fmt: skip

_MODULES = {
    "gmsd": "edges", "sharpness_ratio": "edges", "psnr": "fidelity", "ssim": "fidelity",
    "Metric": "metric", "make_folder_metric": "metric", "make_metric": "metric",
    "METRICS": "names", "MetricInfo": "names", "SMALLEST_SIDE": "names", "Unavailable": "names",
}  # fmt: skip


def __getattr__(name: str) -> object:
    """Load a public name from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
