"""Validation: a few photographs, degraded always alike, restored with always the same noise, scored and shown.

folder --once--> crops --fixed seed--> LQ, noise
parameters of the moment, LQ, noise --FaithDiff.restore--> restored --> scores, LQ | restored | HQ
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from faithdiff_jax.data.decode import decode
from faithdiff_jax.data.degradation.degrade import LEVELS, degrade
from faithdiff_jax.data.pairs import crop_middle, image_generator
from faithdiff_jax.data.sources import PhotoFolder
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.metrics import SMALLEST_SIDE, gmsd, psnr, sharpness_ratio, ssim
from faithdiff_jax.files.captions import trim_caption
from faithdiff_jax.files.sheets import at_most, side_by_side, stacked, titled
from faithdiff_jax.files.tokenizers import Tokenizers
from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import Params
from faithdiff_jax.training.config import VALIDATION_SCALE, ValidationConfig

LARGEST_SIDE = 4096  # of the picture of all pictures
MEASURES = {"psnr": psnr, "ssim": ssim, "gmsd": gmsd, "sharpness": sharpness_ratio}


class _Case(NamedTuple):
    """What is restored: `hq` (crop, crop, 3) and `lq` (crop / 4, crop / 4, 3) uint8, and `enlarged`, LQ at HQ's size.

    `noise` is what `FaithDiff.restore` takes.
    """

    name: str
    hq: np.ndarray
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
        """Read and degrade the photographs: the first `config.count` by their paths, or all there are.

        Their captions are those beside them, trimmed as in training. Each photograph's degradation and noise depend on
        the seed and its file name only.

        Args:
            config: which photographs, how degraded and how restored.
            model_config: the architecture.
            tokenizers: the model's.
            dtype: what the networks compute in.
            mesh: devices to spread over, None for the default device.

        Raises:
            InputError: no photographs, one that cannot be read or is smaller than the crop, or a crop or number of
                steps that the model cannot have.
        """
        self.config = config
        factor = model_config.vae.factor
        multiple = math.lcm(VALIDATION_SCALE, factor)
        least = max(SMALLEST_SIDE, factor * model_config.unet.smallest_side)
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
        photographs = PhotoFolder(config.photos)
        self._cases = [self._case(photographs, index, shape) for index in range(min(config.count, len(photographs)))]
        # One for all runs: it says once that it compiles, and gets parameters for as long as a run lasts.
        self._model = FaithDiff(model_config, {}, tokenizers, dtype=dtype, mesh=mesh)

    def run(self, params: Mapping[str, Params]) -> tuple[dict[str, float], np.ndarray]:
        """Restore all pictures and compare them with the photographs.

        With several processes all of them must call this, with the same parameters; each gets the same results.

        Args:
            params: part name -> pytree, as `FaithDiff` takes them.

        Returns:
            The means over the pictures of "psnr" in dB, "ssim", "gmsd" and "sharpness" (see `evaluation.metrics`), and
            one picture: a row of LQ, restored and HQ for each, (H, W, 3) uint8.
        """
        self._model.params = dict(params)
        try:
            restored = [self._restore(case) for case in self._cases]
        finally:
            # Not to keep them alive until the next run.
            self._model.params = {}
        scores = {
            name: float(np.mean([measure(ours, case.hq) for ours, case in zip(restored, self._cases, strict=True)]))
            for name, measure in MEASURES.items()
        }
        rows = [_row(case, ours) for ours, case in zip(restored, self._cases, strict=True)]
        return scores, at_most(stacked(rows), LARGEST_SIDE)

    def _case(self, photographs: PhotoFolder, index: int, shape: tuple[int, ...]) -> _Case:
        record = photographs[index]
        name = photographs.name(index)
        try:
            hq = crop_middle(decode(record.hq, name), VALIDATION_SCALE, self.config.crop)
        except InputError as error:
            raise InputError(f"validation.photos: {name}: {str(error).removeprefix(f'{name}: ')}") from None
        rng = image_generator(self.config.seed, name.rpartition("/")[2])
        lq = degrade(hq, rng, LEVELS[self.config.level])
        noise = {part: rng.standard_normal(shape, np.float32) for part in ("start", "encode")}
        size = hq.shape[1], hq.shape[0]
        enlarged = np.array(Image.fromarray(lq).resize(size, Image.Resampling.BICUBIC))
        return _Case(name.rpartition("/")[2], hq, lq, enlarged, trim_caption(record.caption), noise)

    def _restore(self, case: _Case) -> np.ndarray:
        return self._model.restore(case.lq, case.caption, self.config.restore, noise=case.noise)


def _row(case: _Case, restored: np.ndarray) -> np.ndarray:
    return side_by_side(
        [
            titled(f"LQ, bicubic {psnr(case.enlarged, case.hq):.2f} dB", case.enlarged),
            titled(f"restored {psnr(restored, case.hq):.2f} dB", restored),
            titled(f"HQ {case.name}", case.hq),
        ]
    )
