"""Crops of photographs to evaluate restorers on: some photographs by lot or by name, of each the part with most edges.

    python benchmarks/photograph_crops.py PHOTOS WORK/originals
    python benchmarks/photograph_crops.py PHOTOS WORK/originals --split test

Photographs that have at least the crop's size are sorted by name, and `--count` of them drawn with `--seed`; or those
are taken that `examples/tiny/photographs.tsv` counts to a split, as gathered or as `training_photos.py` wrote them. Of
each, the square is taken, among those on a grid of 32 pixels, whose mean gradient magnitude (Prewitt, of the luma) is
the largest: what is out of focus cannot tell restorers apart. The rule looks at originals only, never at a result.
"""

import argparse
import csv
import pathlib
import sys

import cv2
import numpy as np
from PIL import Image

from faithdiff_jax.evaluation.metrics.pictures import luma
from faithdiff_jax.files.images import load_image, save_image
from faithdiff_jax.files.listing import list_images

GRID = 32
MANIFEST = pathlib.Path(__file__).parent.parent / "examples" / "tiny" / "photographs.tsv"


def of_split(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
    """The photographs of a split in a folder; SystemExit for one that is missing."""
    with MANIFEST.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        paths = [folder / row["file"] for row in rows if row["split"] == split]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        sys.exit(f"error: {missing[0] if missing else f'{MANIFEST}: split {split!r}'}: not found")
    return paths


def large_enough(path: pathlib.Path, side: int) -> bool:
    with Image.open(path) as picture:
        return min(picture.size) >= side


def sharpest(picture: np.ndarray, side: int) -> tuple[int, int]:
    """Top and left of the square with the largest mean gradient magnitude; of equal ones, the first."""
    y = luma(picture)
    difference, total = np.array([-1.0, 0.0, 1.0]) / 3, np.ones(3)
    gradient = np.hypot(cv2.sepFilter2D(y, -1, difference, total), cv2.sepFilter2D(y, -1, total, difference))
    sums = cv2.integral(gradient)
    corners = [
        (top, left)
        for top in range(0, picture.shape[0] - side + 1, GRID)
        for left in range(0, picture.shape[1] - side + 1, GRID)
    ]
    return max(
        corners,
        key=lambda corner: (
            sums[corner[0] + side, corner[1] + side]
            - sums[corner[0], corner[1] + side]
            - sums[corner[0] + side, corner[1]]
            + sums[corner]
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", help="train, validation or test: all of that split instead of some by lot")
    options = parser.parse_args()
    if options.split:
        chosen = of_split(options.photos, options.split)
    else:
        paths = [path for path in list_images(options.photos) if large_enough(path, options.side)]
        drawn = np.random.default_rng(options.seed).choice(len(paths), options.count, replace=False)
        chosen = [paths[index] for index in drawn]
    options.output.mkdir(parents=True, exist_ok=True)
    for path in sorted(chosen):
        picture = load_image(path).rgb
        top, left = sharpest(picture, options.side)
        crop = picture[top : top + options.side, left : left + options.side]
        save_image(options.output / f"{path.stem}.png", np.ascontiguousarray(crop))
        print(f"{path.name}: {options.side}x{options.side} from ({left}, {top})")


if __name__ == "__main__":
    main()
