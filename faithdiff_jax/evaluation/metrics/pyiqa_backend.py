"""Metrics that pyiqa computes, called by its names for them: MUSIQ, MANIQA, CLIPIQA, PaQ-2-PiQ, FID.

pyiqa's licence is PolyForm Noncommercial 1.0.0: users install it themselves, nothing of it is here. It fetches weights
when a metric is first used, into $TORCH_HOME/hub/pyiqa, and asks no network for what is there.
"""

import contextlib
import importlib
import logging
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.metrics.names import Unavailable
from faithdiff_jax.evaluation.metrics.pictures import Picture
from faithdiff_jax.files.listing import list_pictures

LICENCE = "pyiqa computes it, whose licence allows noncommercial use only (PolyForm Noncommercial 1.0.0)"
LEAST_PICTURES = 2  # of a folder, for FID: one has no covariance

log = logging.getLogger("faithdiff_jax")


def picture_metric(name: str) -> Callable[[Sequence[Picture], Sequence[Picture]], list[float]]:
    """A metric without reference, by pyiqa's name: a function of pictures, and of nothing, which goes one by one.

    Raises:
        Unavailable: pyiqa, a package that it needs or the metric's weights are missing.
    """
    metric, torch = _created(name)

    def measure(pictures: Sequence[Picture], references: Sequence[Picture]) -> list[float]:
        tensors = (
            torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))[None] / 255 for picture in pictures
        )
        with contextlib.redirect_stdout(sys.stderr), torch.no_grad():
            return [float(metric(tensor)) for tensor in tensors]

    return measure


def folder_metric(name: str) -> Callable[[pathlib.Path, pathlib.Path], float]:
    """A metric of two folders, by pyiqa's name: the restored pictures and the originals, each with those of subfolders.

    Raises:
        Unavailable: pyiqa, a package that it needs or the metric's weights are missing.
    """
    metric, _ = _created(name)

    def measure(restored: pathlib.Path, references: pathlib.Path) -> float:
        for folder in (restored, references):
            if (count := len(list_pictures(folder, deep=True).names)) < LEAST_PICTURES:
                raise InputError(f"{folder}: has {count} pictures, {name} needs {LEAST_PICTURES} at least")
        # Worker processes would be forks of a process in which JAX has threads.
        with contextlib.redirect_stdout(sys.stderr):
            return float(metric(str(restored), str(references), verbose=False, num_workers=0))

    return measure


def _created(name: str) -> tuple[Any, Any]:
    """pyiqa's metric, and torch."""
    with contextlib.redirect_stdout(sys.stderr):  # pyiqa prints what it loads
        try:
            pyiqa = import_pyiqa()
        except ModuleNotFoundError as error:
            missing = (error.name or "pyiqa").partition(".")[0]
            raise Unavailable(f"{name}: {missing} is not installed: pip install pyiqa; {LICENCE}") from None
        except Exception as error:  # packages of versions that do not fit fail in any way
            raise Unavailable(f"{name}: pyiqa cannot be imported ({_reason(error)})") from None
        try:
            metric = pyiqa.create_metric(name)
        except ModuleNotFoundError as error:
            raise Unavailable(f"{name}: pyiqa needs {error.name}, which is not installed") from None
        except OSError as error:
            place = "$TORCH_HOME/hub, where pyiqa looks first"
            raise Unavailable(
                f"{name}: its weights cannot be fetched ({_reason(error)}) and are not in {place}"
            ) from None
        except Exception as error:  # damaged weights, a name that this version does not have
            raise Unavailable(f"{name}: pyiqa cannot prepare it ({_reason(error)})") from None
    log.warning("%s: %s", name, LICENCE)
    return metric, importlib.import_module("torch")


def import_pyiqa() -> Any:
    """Import pyiqa, also where torchvision's wheel for CUDA lies beside the CPU build of torch.

    torchvision's compiled operators do not load there, and what it registers for two of them fails until somebody
    declares them.
    """
    try:
        return importlib.import_module("pyiqa")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for module in [module for module in sys.modules if module.partition(".")[0] in ("pyiqa", "torchvision")]:
        del sys.modules[module]
    library = importlib.import_module("torch").library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)
    return importlib.import_module("pyiqa")


_DECLARED: list[Any] = []
"""Declarations end with the object that made them."""


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
