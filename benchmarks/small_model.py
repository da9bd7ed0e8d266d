"""How well the small model restores photographs that it has not seen, stage by stage and beside bicubic.

    python benchmarks/small_model.py                                                 # the model that comes along
    python benchmarks/small_model.py --presets faithful detailed
    python benchmarks/small_model.py steps=4 color_fix=none --models work/base work/stage1 work/stage2 --crop 256

The middle of each held-out photograph is degraded at levels I, II and III with fixed seeds, a quarter of the size, and
restored with each model's own defaults or presets; figures are means over photographs and seeds. LPIPS needs the extra
`evaluate`.
"""

import argparse
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from faithdiff_jax import SMALL_MODEL, FaithDiff, RestoreOptions
from faithdiff_jax.config import from_dict, override, to_dict
from faithdiff_jax.data.decode import decode
from faithdiff_jax.data.degradation.degrade import LEVELS, degrade
from faithdiff_jax.data.pairs import crop_middle, image_generator
from faithdiff_jax.data.sources import PhotoFolder
from faithdiff_jax.evaluation.measuring import Metrics, measure
from faithdiff_jax.evaluation.protocols import Protocol
from faithdiff_jax.evaluation.statistics import mean_with_interval
from faithdiff_jax.evaluation.tables import Line, Summary, markdown
from faithdiff_jax.files.captions import trim_caption
from faithdiff_jax.files.images import to_float, to_uint8

SCALE = 4
METRICS = ("psnr", "ssim", "lpips", "gmsd", "sharpness")
PROTOCOL = Protocol(name="rgb", metrics=METRICS, ssim="rgb")
EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


class Case(NamedTuple):
    """A picture to restore, its caption, and the truth; pictures are (H, W, 3) uint8."""

    low: np.ndarray
    caption: str
    reference: np.ndarray


Restore = Callable[[np.ndarray, str], np.ndarray]


def evaluated(level: str, name: str, restore: Restore, pictures: Sequence[Case]) -> Line:
    """Restore and measure: a row of the table."""
    restored = [restore(case.low, case.caption) for case in pictures]
    references = [case.reference for case in pictures]
    found = measure(Metrics.make(METRICS, PROTOCOL), restored, references, [{}] * len(pictures))
    means = {metric: mean_with_interval([one.figures[metric] for one in found]) for metric in METRICS}
    return Line(level, name, len(pictures), means)


def cases(folder: pathlib.Path, captions: pathlib.Path | None, level: str, crop: int, seeds: int) -> list[Case]:
    """Every photograph of a folder, degraded once for each seed."""
    photographs = PhotoFolder(folder, captions)
    found = []
    for index in range(len(photographs)):
        record, name = photographs[index], photographs.name(index)
        hq = decode(record.hq, name)
        side = min(crop, min(hq.shape[:2]) // 32 * 32)
        hq = crop_middle(hq, SCALE, side)
        for seed in range(seeds):
            low = degrade(hq, image_generator(seed, pathlib.Path(name).name), LEVELS[level])
            found.append(Case(low, trim_caption(record.caption), hq))
    return found


def bicubic(low: np.ndarray, caption: str) -> np.ndarray:
    height, width = low.shape[:2]
    return np.array(Image.fromarray(low).resize((SCALE * width, SCALE * height), Image.Resampling.BICUBIC))


def restorers(path: pathlib.Path, presets: Sequence[str], changes: Mapping[str, Any]) -> dict[str, Restore]:
    """A model under each of the presets, or with its defaults where there are none named, with changed options."""
    model = FaithDiff.load(path)
    chosen = {f"{path.name}, {name}": model.preset(name) for name in presets} or {path.name: model.defaults}
    made = {}
    for name, start in chosen.items():
        options = from_dict(RestoreOptions, {**to_dict(start), "scale": SCALE, **changes}, "options")
        made[name] = lambda low, caption, options=options: model.restore(low, caption, options)
    return made


def through_autoencoder(path: pathlib.Path) -> Restore:
    """What is left of bicubic when a model's autoencoder has encoded and decoded it: the rest of the model aside."""
    model = FaithDiff.load(path)

    def restore(low: np.ndarray, caption: str) -> np.ndarray:
        enlarged = to_float(bicubic(low, caption))[None]
        shape = (
            1,
            *(side // model.config.vae.factor for side in enlarged.shape[1:3]),
            model.config.vae.latent_channels,
        )
        decoded = model.decode(model.encode(enlarged, np.zeros(shape, np.float32)))
        return to_uint8(np.asarray(decoded)[0])

    return restore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=pathlib.Path, default=EXAMPLES / "originals")
    parser.add_argument("--captions", type=pathlib.Path, help="folder; without, no captions are used")
    parser.add_argument("--models", type=pathlib.Path, nargs="+", default=[SMALL_MODEL])
    parser.add_argument("--presets", nargs="*", default=[], help="of the models, instead of their defaults")
    parser.add_argument("--levels", nargs="*", choices=list(LEVELS), default=list(LEVELS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--autoencoder", action="store_true", help="also what the first model's makes of bicubic")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="of restoring, instead of the models' own")
    options = parser.parse_args()
    methods = {"bicubic": bicubic}
    if options.autoencoder:
        methods["bicubic, autoencoder"] = through_autoencoder(options.models[0])
    for path in options.models:
        methods |= restorers(path, options.presets, override({}, options.options))
    lines = []
    for level in options.levels:
        pictures = cases(options.photos, options.captions, level, options.crop, options.seeds)
        lines += [evaluated(level, name, restore, pictures) for name, restore in methods.items()]
    print(markdown(Summary(METRICS, lines)))


if __name__ == "__main__":
    main()
