"""The metrics by name: titles for tables, which way is better, what each needs. Imports nothing heavy."""

import dataclasses
import difflib
from typing import Literal

from faithdiff_jax.config import shown
from faithdiff_jax.errors import InputError

SMALLEST_SIDE = 11
"""In pixels: the side of SSIM's window, and what `gmsd` and `sharpness_ratio` ask for as well."""

NONCOMMERCIAL = "through pyiqa, whose licence is PolyForm Noncommercial"


class Unavailable(InputError):
    """A metric that cannot be computed here: one line says why, and how to get what is missing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """What is known of a metric before it is computed."""

    title: str
    digits: int
    """After the decimal point, in tables."""
    better: Literal["higher", "lower", "one"]
    """"one": 1 is like the reference, both sides of it are worse."""
    needs_reference: bool
    smallest_side: int = 1
    """Of the pictures, in pixels, before a protocol's border is cut off."""
    backend: Literal["numpy", "jax", "pyiqa", "onnx"] = "numpy"
    note: str = ""
    over_folders: bool = False
    """Compares two folders of pictures instead of two pictures: see `metric.make_folder_metric`."""


def _of_pyiqa(title: str, digits: int, note: str = "") -> MetricInfo:
    """A metric without reference that pyiqa computes."""
    note = f"{note}; {NONCOMMERCIAL}" if note else NONCOMMERCIAL
    return MetricInfo(
        title=title,
        digits=digits,
        better="higher",
        needs_reference=False,
        smallest_side=32,
        backend="pyiqa",
        note=note,
    )


def _of_words(title: str) -> MetricInfo:
    """A metric of the words that PP-OCRv3 reads; see `evaluation.ocr`."""
    return MetricInfo(
        title=title,
        digits=4,
        better="higher",
        needs_reference=True,
        smallest_side=32,
        backend="onnx",
        note="words read by PP-OCRv3, against those it reads in the reference",
    )


METRICS = {
    "psnr": MetricInfo(title="PSNR", digits=2, better="higher", needs_reference=True),
    "ssim": MetricInfo(title="SSIM", digits=4, better="higher", needs_reference=True, smallest_side=SMALLEST_SIDE),
    "lpips": MetricInfo(
        title="LPIPS", digits=4, better="lower", needs_reference=True, smallest_side=31, backend="jax",
        note="on the protocol's network",
    ),
    "lpips-vgg": MetricInfo(
        title="LPIPS (VGG)", digits=4, better="lower", needs_reference=True, smallest_side=16, backend="jax",
        note="on VGG16 under every protocol",
    ),
    "dists": MetricInfo(title="DISTS", digits=4, better="lower", needs_reference=True, smallest_side=16, backend="jax"),
    "gmsd": MetricInfo(title="GMSD", digits=4, better="lower", needs_reference=True, smallest_side=SMALLEST_SIDE),
    "sharpness": MetricInfo(
        title="sharpness", digits=2, better="one", needs_reference=True, smallest_side=SMALLEST_SIDE,
        note="mean gradient over the reference's",
    ),
    "niqe": MetricInfo(
        title="NIQE", digits=4, better="lower", needs_reference=False, smallest_side=96, note="of two blocks at least"
    ),
    "musiq": _of_pyiqa("MUSIQ", 2, "trained on KonIQ-10k"),
    "maniqa": _of_pyiqa("MANIQA", 4, "trained on KonIQ-10k"),
    "maniqa-pipal": _of_pyiqa("MANIQA (PIPAL)", 4, "trained on PIPAL"),
    "clipiqa": _of_pyiqa("CLIPIQA", 4),
    "clipiqa+": _of_pyiqa("CLIPIQA+", 4, "on ResNet-50"),
    "clipiqa+_vitL14_512": _of_pyiqa("CLIPIQA+ (ViT-L/14)", 4, "on ViT-L/14 at 512 pixels"),
    "paq2piq": _of_pyiqa("PaQ-2-PiQ", 2),
    "ocr_precision": _of_words("OCR precision"),
    "ocr_recall": _of_words("OCR recall"),
    "ocr_f": _of_words("OCR F-score"),
    "fid": MetricInfo(
        title="FID", digits=2, better="lower", needs_reference=True, backend="pyiqa", over_folders=True,
        note=f"unstable below some thousand pictures; {NONCOMMERCIAL}",
    ),
}  # fmt: skip


def metric_info(name: str) -> MetricInfo:
    """What is known of the metric of this name.

    Raises:
        InputError: there is none; the nearest name or all of them are given.
    """
    if name not in METRICS:
        close = difflib.get_close_matches(name.lower(), METRICS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the metrics are {', '.join(METRICS)}"
        raise InputError(f"no metric {shown(name)}; {hint}")
    return METRICS[name]


def picture_metric_info(name: str) -> MetricInfo:
    """The same of a metric that has a figure for each picture.

    Raises:
        InputError: there is no such metric, or it compares folders.
    """
    info = metric_info(name)
    if info.over_folders:
        raise InputError(f"{name} compares folders: it has no figure for a single picture")
    return info
