"""What padding to shared sizes changes in a restored picture: `--multiple N` beside every picture at its own size.

    python benchmarks/photograph_crops.py PHOTOS WORK/crops --split validation --side 256
    python benchmarks/padding.py WORK/crops
    python benchmarks/padding.py WORK/crops --multiples 64 128 256 steps=20 guidance=3

Each crop is cut to a size of its own by lot, degraded at level II, a quarter of the size, and restored from the same
seed. PSNR and the largest difference in levels are to the picture restored without padding, over the whole picture and
without the 32 pixels along the padding; the last two columns are PSNR and LPIPS to the original (LPIPS needs the extra
`evaluate`). Another seed stands beside for scale.
"""

import argparse
import pathlib

import numpy as np
from small_model import SCALE, cases

from faithdiff_jax import SMALL_MODEL, FaithDiff
from faithdiff_jax.config import override, to_dict
from faithdiff_jax.evaluation.measuring import Metrics, measure
from faithdiff_jax.evaluation.protocols import Protocol

METRICS = ("psnr", "lpips")
BORDER = 32


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crops", type=pathlib.Path)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="of RestoreOptions")
    parser.add_argument("--model", type=pathlib.Path, default=SMALL_MODEL)
    parser.add_argument("--side", type=int, default=256, help="of a crop, at most; pixels")
    parser.add_argument("--multiples", type=int, nargs="+", default=(64, 128, 256))
    given = parser.parse_args()
    model, rng = FaithDiff.load(given.model), np.random.default_rng(0)
    defaults = model.defaults.replace(**override(to_dict(model.defaults.replace(scale=SCALE)), given.changes))
    pictures = []
    for case in cases(given.crops, None, "II", given.side, seeds=1):
        height, width = (int(rng.integers(side // 2, side + 1)) for side in case.low.shape[:2])
        low, reference = case.low[:height, :width], case.reference[: SCALE * height, : SCALE * width]
        pictures.append((np.ascontiguousarray(low), np.ascontiguousarray(reference)))
    settings = {"own size": {"multiple": None}, "own size, another seed": {"multiple": None, "seed": 7}}
    settings |= {f"--multiple {multiple}": {"multiple": multiple} for multiple in given.multiples}
    restored = {
        name: [model.restore(low, "", defaults, **changes) for low, _ in pictures] for name, changes in settings.items()
    }
    exact, references = restored["own size"], [reference for _, reference in pictures]
    print(f"{len(pictures)} pictures, {' '.join(given.changes) or 'the defaults of the model'}\n")
    print("| | PSNR to own size | inside | largest difference | PSNR to the original | LPIPS |")
    print("|---|---|---|---|---|---|")
    for name, found in restored.items():
        pairs = list(zip(found, exact, strict=True))
        whole = np.mean([psnr(*pair) for pair in pairs])
        inside = np.mean([psnr(one[:-BORDER, :-BORDER], other[:-BORDER, :-BORDER]) for one, other in pairs])
        largest = max(int(np.abs(one.astype(int) - other).max()) for one, other in pairs)
        metrics = Metrics.make(METRICS, Protocol(name="rgb", metrics=METRICS, ssim="rgb"))
        figures = [one.figures for one in measure(metrics, found, references, [{}] * len(found))]
        true = [np.mean([one[metric] for one in figures]) for metric in METRICS]
        close = " | | " if name == "own size" else f"{whole:.1f} | {inside:.1f} | {largest}"
        print(f"| {name} | {close} | {true[0]:.2f} | {true[1]:.3f} |")


if __name__ == "__main__":
    main()
