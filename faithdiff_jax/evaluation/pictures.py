"""A restored picture beside what it is to be judged by."""

import numpy as np
from PIL import Image

from faithdiff_jax.evaluation.metrics import psnr
from faithdiff_jax.files.sheets import side_by_side, titled


def comparison(low: np.ndarray, restored: np.ndarray, reference: np.ndarray | None = None) -> np.ndarray:
    """What a restoration is to be judged by, in a row: input, bicubic, restored and, where there is one, the original.

    Args:
        low: the low-quality input, (h, w, 3) uint8; shown with its pixels as squares.
        restored: (H, W, 3) uint8.
        reference: (H, W, 3) uint8, the true picture; titles then give each one's PSNR against it.

    Returns:
        One picture: (H + 18, 3 or 4 times W and gaps of 4, 3) uint8, each under its title.
    """
    size = restored.shape[1], restored.shape[0]
    squares, bicubic = (
        np.array(Image.fromarray(low).resize(size, method))
        for method in (Image.Resampling.NEAREST, Image.Resampling.BICUBIC)
    )
    row = [("input", squares), ("bicubic", bicubic), ("restored", restored)]
    if reference is not None:
        row[1:] = [(f"{title}, {psnr(picture, reference):.2f} dB", picture) for title, picture in row[1:]]
        row.append(("original", reference))
    return side_by_side([titled(title, picture) for title, picture in row])
