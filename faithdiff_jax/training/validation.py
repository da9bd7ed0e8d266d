"""Validation: a few pictures restored with always the same noise, scored and shown.

photographs --once--> crops --fixed seed--> LQ, noise
real low-quality pictures --once--> crops, noise
parameters of the moment, LQ, noise --FaithDiff.restore--> restored --> scores, LQ | restored | HQ
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from faithdiff_jax.data.decode import decode
from faithdiff_jax.data.degradation.degrade import LEVELS, degrade
from faithdiff_jax.data.pairs import crop_middle, image_generator
from faithdiff_jax.data.sources import PhotoFolder
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.metrics import Metric, make_metric, psnr
from faithdiff_jax.evaluation.protocols import find_protocol
from faithdiff_jax.files.captions import trim_caption
from faithdiff_jax.files.sheets import at_most, side_by_side, stacked, titled
from faithdiff_jax.files.tokenizers import Tokenizers
from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import Params
from faithdiff_jax.training.config import VALIDATION_SCALE, ValidationConfig

LARGEST_SIDE = 4096  # of the picture of all pictures


class _Case(NamedTuple):
    """What is restored: `lq` (crop / 4, crop / 4, 3) uint8, and `enlarged`, the same by bicubic at the restored size.

    `hq` is the photograph, (crop, crop, 3) uint8, or None where there is none. `folder` is what scores are named after,
    "" for the photographs. `noise` is what `FaithDiff.restore` takes.
    """

    name: str
    folder: str
    hq: np.ndarray | None
    lq: np.ndarray
    enlarged: np.ndarray
    caption: str
    noise: dict[str, np.ndarray]


class Validation:
    """Restores the same pictures of a folder whenever it is run, so that only the parameters make a difference."""

    def __init__(
        self,
        config: ValidationConfig,
        model_config: FaithDiffConfig,
        tokenizers: Tokenizers,
        *,
        dtype: Any,
        mesh: Mesh | None,
    ):
        """Read the pictures, and degrade the photographs: of each folder the first `config.count` by their paths.

        Their captions are those beside them, trimmed as in training. A picture's degradation and noise depend on the
        seed and its file name only. Every metric is computed once, so that what it lacks is found before training.

        Args:
            config: which pictures, how degraded, restored and measured.
            model_config: the architecture.
            tokenizers: the model's.
            dtype: what the networks compute in.
            mesh: devices to spread over, None for the default device.

        Raises:
            InputError: no pictures, one that cannot be read or is smaller than the crop, a crop or number of steps that
                the model cannot have, or a metric that cannot be computed.
        """
        self.config = config
        factor = model_config.vae.factor
        multiple = math.lcm(VALIDATION_SCALE, factor)
        least = factor * model_config.unet.smallest_side
        if config.crop % multiple or config.crop < least:
            raise InputError(
                f"validation.crop is {config.crop}: must be a multiple of {multiple}, and at least {least}, "
                "for this model"
            )
        try:
            config.restore.check_against(model_config)
        except InputError as error:
            raise InputError(f"validation.restore: {error}") from None
        side = config.crop // factor
        shape = (1, side, side, model_config.vae.latent_channels)
        self._cases = [] if config.photos is None else self._photographs(config.photos, shape)
        for folder in config.real:
            self._cases += self._real(folder, shape)
        self._metrics = self._prepared()
        # One for all runs: it says once that it compiles, and gets parameters for as long as a run lasts.
        self._model = FaithDiff(model_config, {}, tokenizers, dtype=dtype, mesh=mesh)

    def run(self, params: Mapping[str, Params]) -> tuple[dict[str, float], np.ndarray]:
        """Restore all pictures and compare them with the photographs.

        With several processes all of them must call this, with the same parameters; each gets the same results.

        Args:
            params: part name -> pytree, as `FaithDiff` takes them.

        Returns:
            The means over the photographs by the metric's name and those over a folder of real pictures by
            "FOLDER/METRIC"; and one picture, (H, W, 3) uint8: a row of LQ, restored HQ (if any) of each.
        """
        self._model.params = dict(params)
        try:
            restored = [self._restore(case) for case in self._cases]
        finally:
            # Not to keep them alive until the next run.
            self._model.params = {}
        rows = [_row(case, ours) for ours, case in zip(restored, self._cases, strict=True)]
        return self._scores(restored), at_most(stacked(rows), LARGEST_SIDE)

    def _prepared(self) -> list[Metric]:
        """The metrics, each tried on what bicubic makes of the pictures."""
        try:
            protocol = find_protocol(self.config.protocol)
        except InputError as error:
            raise InputError(f"validation.protocol: {error}") from None
        try:
            metrics = [make_metric(name, protocol) for name in self.config.metrics]
            for metric in metrics:
                for case in [case for case in self._cases if _fits(metric, case)][:1]:
                    _measured(metric, [case], [case.enlarged])
        except InputError as error:
            raise InputError(f"validation.metrics: {error}") from None
        return metrics

    def _scores(self, restored: Sequence[np.ndarray]) -> dict[str, float]:
        scores = {}
        for folder in dict.fromkeys(case.folder for case in self._cases):
            for metric in self._metrics:
                pairs = zip(self._cases, restored, strict=True)
                chosen = [(case, ours) for case, ours in pairs if case.folder == folder and _fits(metric, case)]
                if chosen:
                    name = f"{folder}/{metric.name}" if folder else metric.name
                    scores[name] = float(np.mean(_measured(metric, *zip(*chosen, strict=True))))
        return scores

    def _photographs(self, folder: str, shape: tuple[int, ...]) -> list[_Case]:
        cases = []
        for name, hq, caption in self._pictures("photos", folder, self.config.crop):
            rng = image_generator(self.config.seed, name)
            lq = degrade(hq, rng, LEVELS[self.config.level])
            cases.append(_Case(name, "", hq, lq, _enlarged(lq), caption, _noise(rng, shape)))
        return cases

    def _real(self, folder: str, shape: tuple[int, ...]) -> list[_Case]:
        title = pathlib.Path(folder).resolve().name
        if any(case.folder == title for case in self._cases):
            raise InputError(f"validation.real: two folders are called {title}: scores are named after them")
        cases = []
        for name, lq, caption in self._pictures("real", folder, self.config.crop // VALIDATION_SCALE):
            noise = _noise(image_generator(self.config.seed, name), shape)
            cases.append(_Case(name, title, None, lq, _enlarged(lq), caption, noise))
        return cases

    def _pictures(self, key: str, folder: str, crop: int) -> list[tuple[str, np.ndarray, str]]:
        """File name, middle of `crop` pixels and caption of the first pictures of a folder."""
        source = PhotoFolder(folder)
        found = []
        for index in range(min(self.config.count, len(source))):
            record, name = source[index], source.name(index)
            try:
                picture = crop_middle(decode(record.hq, name), VALIDATION_SCALE, crop)
            except InputError as error:
                raise InputError(f"validation.{key}: {name}: {str(error).removeprefix(f'{name}: ')}") from None
            found.append((pathlib.Path(name).name, picture, trim_caption(record.caption)))
        return found

    def _restore(self, case: _Case) -> np.ndarray:
        return self._model.restore(case.lq, case.caption, self.config.restore, noise=case.noise)


def _noise(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {part: rng.standard_normal(shape, np.float32) for part in ("start", "encode")}


def _enlarged(lq: np.ndarray) -> np.ndarray:
    size = VALIDATION_SCALE * lq.shape[1], VALIDATION_SCALE * lq.shape[0]
    return np.array(Image.fromarray(lq).resize(size, Image.Resampling.BICUBIC))


def _fits(metric: Metric, case: _Case) -> bool:
    return case.hq is not None or not metric.info.needs_reference


def _measured(metric: Metric, cases: Sequence[_Case], restored: Sequence[np.ndarray]) -> list[float]:
    if not metric.info.needs_reference:
        return metric.many(restored)
    return metric.many(restored, [case.hq for case in cases if case.hq is not None])


def _row(case: _Case, restored: np.ndarray) -> np.ndarray:
    if case.hq is None:
        return side_by_side([titled(f"{case.folder} {case.name}", case.enlarged), titled("restored", restored)])
    return side_by_side(
        [
            titled(f"LQ, bicubic {psnr(case.enlarged, case.hq):.2f} dB", case.enlarged),
            titled(f"restored {psnr(restored, case.hq):.2f} dB", restored),
            titled(f"HQ {case.name}", case.hq),
        ]
    )
