"""A metric under a protocol: called with a picture and its reference, or with many of them at once."""

import dataclasses
import functools
import importlib
import pathlib
from collections.abc import Callable, Sequence

from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.metrics.names import MetricInfo, metric_info, picture_metric_info
from faithdiff_jax.evaluation.metrics.pictures import Picture, check_pair, check_picture, check_side
from faithdiff_jax.evaluation.protocols import Protocol, find_protocol

Measure = Callable[[Sequence[Picture], Sequence[Picture]], Sequence[float]]
"""Pictures of one size, and their references or nothing -> a figure for each."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric that is ready to be computed."""

    name: str
    info: MetricInfo
    protocol: Protocol
    measure: Measure

    def __call__(self, restored: Picture, reference: Picture | None = None) -> float:
        """The figure of one picture, (H, W, 3) uint8 RGB; errors as `many` has them."""
        return self.many([restored], None if reference is None else [reference])[0]

    def many(self, restored: Sequence[Picture], references: Sequence[Picture] | None = None) -> list[float]:
        """The figure of each picture; those of one size are computed together where that is faster.

        Args:
            restored: pictures, (H, W, 3) uint8 RGB, of any sizes.
            references: one for each, of its size; None for a metric without reference.

        Raises:
            InputError: references that are missing or not wanted, two sizes, or a picture that is too small.
        """
        self._check(restored, references)
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, picture in enumerate(restored):
            by_size.setdefault(picture.shape, []).append(index)
        figures: dict[int, float] = {}
        for indices in by_size.values():
            ours = [restored[index] for index in indices]
            theirs = [] if references is None else [references[index] for index in indices]
            figures |= zip(indices, self.measure(ours, theirs), strict=True)
        return [float(figures[index]) for index in range(len(restored))]

    def _check(self, restored: Sequence[Picture], references: Sequence[Picture] | None) -> None:
        if references is not None and not self.info.needs_reference:
            raise InputError(f"{self.name} takes no reference: it judges a picture by itself")
        if references is None and self.info.needs_reference:
            raise InputError(f"{self.name} needs a reference: it compares a picture with the original")
        if references is not None and len(references) != len(restored):
            raise InputError(f"{len(restored)} pictures and {len(references)} references: must be as many")
        for index, picture in enumerate(restored):
            if references is None:
                check_picture("restored", picture)
            else:
                check_pair(picture, references[index])
            check_side(picture, self.info.smallest_side)


def make_metric(name: str, protocol: Protocol | str = "paper") -> Metric:
    """Prepare a metric: read its weights, import its package.

    Args:
        name: one of `names.METRICS`.
        protocol: which definition of it; also the name or file of one (`protocols.find_protocol`).

    Raises:
        InputError: there is no such metric or protocol, or the metric compares folders.
        Unavailable: weights or a package are missing.
    """
    info = picture_metric_info(name)
    if isinstance(protocol, str):
        protocol = find_protocol(protocol)
    if info.backend == "pyiqa":
        from faithdiff_jax.evaluation.metrics.pyiqa_backend import picture_metric

        return Metric(name, info, protocol, picture_metric(name))
    return Metric(name, info, protocol, _MAKERS[name](protocol))


def make_folder_metric(name: str) -> Callable[[pathlib.Path, pathlib.Path], float]:
    """Prepare a metric that compares folders: a function of the restored pictures' folder and the originals'.

    Raises:
        InputError: there is no such metric, or it compares pictures.
        Unavailable: weights or a package are missing.
    """
    if not metric_info(name).over_folders:
        raise InputError(f"{name} compares pictures, not folders")
    from faithdiff_jax.evaluation.metrics.pyiqa_backend import folder_metric

    return folder_metric(name)


def _psnr(protocol: Protocol) -> Measure:
    from faithdiff_jax.evaluation.metrics.fidelity import PYIQA_EPSILON, psnr

    return _each(functools.partial(psnr, color=protocol.psnr, border=protocol.border, epsilon=PYIQA_EPSILON))


def _ssim(protocol: Protocol) -> Measure:
    from faithdiff_jax.evaluation.metrics.fidelity import ssim

    return _each(functools.partial(ssim, color=protocol.ssim, border=protocol.border, nonnegative=True))


def _edges(function: str) -> Callable[[Protocol], Measure]:
    module = "faithdiff_jax.evaluation.metrics.edges"
    return lambda protocol: _each(getattr(importlib.import_module(module), function))


def _lpips(protocol: Protocol) -> Measure:
    from faithdiff_jax.evaluation.metrics.perceptual import lpips

    return lpips(protocol.lpips)


def _lpips_vgg(protocol: Protocol) -> Measure:
    from faithdiff_jax.evaluation.metrics.perceptual import lpips

    return lpips("vgg")


def _dists(protocol: Protocol) -> Measure:
    from faithdiff_jax.evaluation.metrics.perceptual import dists

    return dists()


def _niqe(protocol: Protocol) -> Measure:
    from faithdiff_jax.evaluation.metrics.niqe import niqe

    return lambda pictures, references: [niqe(picture, color=protocol.niqe) for picture in pictures]


def _words(figure: str) -> Callable[[Protocol], Measure]:
    def make(protocol: Protocol) -> Measure:
        from faithdiff_jax.evaluation import ocr

        return ocr.metric(figure)

    return make


def _each(function: Callable[[Picture, Picture], float]) -> Measure:
    """Pair by pair."""
    return lambda restored, references: [function(*pair) for pair in zip(restored, references, strict=True)]


_MAKERS: dict[str, Callable[[Protocol], Measure]] = {
    "psnr": _psnr,
    "ssim": _ssim,
    "lpips": _lpips,
    "lpips-vgg": _lpips_vgg,
    "dists": _dists,
    "niqe": _niqe,
    "ocr_precision": _words("precision"),
    "ocr_recall": _words("recall"),
    "ocr_f": _words("f_score"),
    "gmsd": _edges("gmsd"),
    "sharpness": _edges("sharpness_ratio"),
}
