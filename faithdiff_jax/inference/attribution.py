"""Attribution maps of a picture (DAAM): words of its caption to weights of tokens, latent pixels to picture pixels."""

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float32

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.tokenizers import Tokenizers


def word_weights(tokenizers: Tokenizers, caption: str, words: Sequence[str]) -> Float32[np.ndarray, "1 m {len(words)}"]:
    """(1, 77, W), the weight of each token of a caption in each word: as published, the mean over its tokens.

    The tokens of a word are those of all its occurrences (see `Tokenizers.positions`).

    Raises:
        InputError: no words, or one that is not in the caption.
    """
    if isinstance(words, str) or not words:
        raise InputError(f"words is {words!r}: must be a list of words of the caption, at least one")
    weights = np.zeros((1, tokenizers([caption])[0].shape[1], len(words)), np.float32)
    for number, word in enumerate(words):
        positions = tokenizers.positions(caption, word)
        weights[0, positions, number] = 1 / len(positions)
    return weights


def enlarged(
    maps: Float32[np.ndarray, "h w words"], factor: int, height: int, width: int
) -> list[Float32[np.ndarray, "{height} {width}"]]:
    """Maps at the resolution of latents, `factor` times as large (bicubic), without padding and negative values."""
    size = maps.shape[1] * factor, maps.shape[0] * factor
    large = (cv2.resize(np.ascontiguousarray(one), size, interpolation=cv2.INTER_CUBIC) for one in np.rollaxis(maps, 2))
    return [np.maximum(one[:height, :width], 0) for one in large]
