"""RRDBNet as a `Restorer`: any picture through a few compiled programs, in bounded memory.

    picture -> windows of at most `tile` pixels -> padded to a size with a program -> RRDBNet -> cut, put together

A picture that fits one window comes out as it would alone. Of a larger one windows overlap, and each gives the pixels
that are farther from its edge than from its neighbour's: 64 or more, where what lies outside changes the published
x4plus by less than half a level of 255. Real-ESRGAN's own tiles overlap by 10, and change by up to 30 levels at the
seams.
"""

import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float32, UInt8
from PIL import Image

from faithdiff_jax.baselines.rrdbnet import REACH, RRDBNet, RRDBNetConfig
from faithdiff_jax.baselines.rrdbnet_weights import RRDBNetDirectory
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.images import target_size
from faithdiff_jax.models.parts import Params, graph
from faithdiff_jax.sharding import batch_sharding

TILE = 512
MARGIN = 64  # of a window, on each side where there is a neighbour
# Smaller pictures are padded to multiples of this, so that a folder of any sizes needs at most 64 programs.
STEP = 64


class Span(NamedTuple):
    """Along one side: what a window sees, and which of it goes into the result."""

    start: int
    stop: int
    first: int
    last: int


class RRDBNetRestorer:
    """A loaded RRDBNet: Real-ESRGAN, BSRGAN or BSRNet.

    Attributes:
        config: the sizes.
        params: a pytree.
        name: for tables.
        scale: how many times larger a picture becomes on each side.
    """

    def __init__(
        self,
        config: RRDBNetConfig,
        params: Params,
        *,
        name: str = "rrdbnet",
        scale: float | None = None,
        tile: int = TILE,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
    ):
        """Take parameters as they are; `load` reads them from a model directory.

        Args:
            config: the sizes.
            params: a pytree of arrays, on the devices they are for.
            name: for tables.
            scale: of the result; other than the network's, it is resized with Lanczos. None for the network's.
            tile: side of the largest window in pixels, a multiple of 64 and at least 192.
            dtype: what to compute in.
            mesh: devices among which windows are shared out; None for the default device.

        Raises:
            InputError: a tile of another size.
        """
        if tile < 3 * STEP or tile % STEP:
            raise InputError(f"tile is {tile}: must be a multiple of {STEP}, and at least {3 * STEP}")
        self.config, self.params, self.name = config, params, name
        self.scale = config.scale if scale is None else scale
        self._tile, self._mesh = tile, mesh
        self._program = _program(config, jnp.dtype(dtype))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        scale: float | None = None,
        tile: int = TILE,
        dtype: Any = None,
        mesh: Mesh | None = None,
    ) -> "RRDBNetRestorer":
        """Read a model directory that `faithdiff convert --rrdbnet` wrote, and name the restorer after it.

        Args:
            path: the model directory.
            scale: as for the class.
            tile: as for the class.
            dtype: what to hold and compute in; None for bfloat16 on GPU and TPU, float32 on CPU.
            mesh: as for the class; every device holds all parameters.

        Raises:
            InputError: not such a directory, or one that is incomplete or altered.
        """
        stored = RRDBNetDirectory.open(pathlib.Path(path))
        dtype = jnp.dtype(dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16))
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        params = stored.load(dtype=dtype, sharding=everywhere)
        name = stored.path.resolve().name
        return cls(stored.config, params, name=name, scale=scale, tile=tile, dtype=dtype, mesh=mesh)

    def restore(self, image: UInt8[np.ndarray, "h w 3"], caption: str = "") -> UInt8[np.ndarray, "H W 3"]:
        """See `Restorer`; the caption is not read.

        Raises:
            InputError: a picture too large or too small for the scale.
        """
        height, width = target_size(image.shape[0], image.shape[1], self.scale)
        target_size(image.shape[0], image.shape[1], self.config.scale)
        restored = np.empty((image.shape[0] * self.config.scale, image.shape[1] * self.config.scale, 3), np.uint8)
        self._fill(restored, image.astype(np.float32) / np.float32(255), _levels)
        if restored.shape[:2] == (height, width):
            return restored
        return np.array(Image.fromarray(restored).resize((width, height), Image.Resampling.LANCZOS))

    def enlarge(self, picture: Float32[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "H W 3"]:
        """The network's output for one picture in [0, 1], (h, w, 3) -> (h * scale, w * scale, 3), not clipped."""
        result = np.empty((picture.shape[0] * self.config.scale, picture.shape[1] * self.config.scale, 3), np.float32)
        self._fill(result, picture, lambda output: output)
        return result

    def _fill(self, result: np.ndarray, picture: np.ndarray, finish: Callable[[np.ndarray], np.ndarray]) -> None:
        """Run the network over windows of a picture, and put what `finish` makes of its outputs into the result."""
        # Networks that begin with pixel unshuffle need even sides: as Real-ESRGAN does.
        unshuffle, scale = self.config.unshuffle, self.config.scale
        extra = [(0, -side % unshuffle) for side in picture.shape[:2]]
        padded = np.pad(picture, [*extra, (0, 0)], mode="reflect" if min(picture.shape[:2]) >= unshuffle else "edge")
        rows, columns = (list(spans(side, self._tile)) for side in padded.shape[:2])
        windows = [(row, column) for row in rows for column in columns]
        batch = 1 if self._mesh is None else self._mesh.size
        for i in range(0, len(windows), batch):
            several = windows[i : i + batch]
            outputs = self._run(padded, several + several[-1:] * (batch - len(several)))
            for (row, column), output in zip(several, outputs, strict=False):
                here = result[row.first * scale : row.last * scale, column.first * scale : column.last * scale]
                top, left = (row.first - row.start) * scale, (column.first - column.start) * scale
                here[:] = finish(output[top : top + here.shape[0], left : left + here.shape[1]])

    def _run(self, picture: np.ndarray, windows: list[tuple[Span, Span]]) -> np.ndarray:
        """The outputs of windows of one size, as one batch."""
        sides = [span.stop - span.start for span in windows[0]]
        sizes = [math.ceil(side / STEP) * STEP for side in sides]
        inputs = np.zeros((len(windows), *sizes, 3), np.float32)
        for i, (row, column) in enumerate(windows):
            inputs[i, : sides[0], : sides[1]] = picture[row.start : row.stop, column.start : column.stop]
        inside = None
        if sides != sizes:
            unshuffle = self.config.unshuffle
            inside = np.zeros((len(windows), sizes[0] // unshuffle, sizes[1] // unshuffle, 1), np.float32)
            inside[:, : sides[0] // unshuffle, : sides[1] // unshuffle] = 1
        arrays: Any = (inputs, inside)
        if self._mesh is not None:
            arrays = jax.device_put(arrays, batch_sharding(self._mesh, len(windows)))
        return np.asarray(self._program(self.params, *arrays))


def _levels(output: np.ndarray) -> np.ndarray:
    """[0, 1] to 0..255: clipped, then rounded to the nearest."""
    levels: np.ndarray = np.rint(np.clip(output, 0, 1) * np.float32(255)).astype(np.uint8)
    return levels


def spans(side: int, tile: int, margin: int = MARGIN) -> Iterator[Span]:
    """The windows along one side of a picture, which together give every pixel once.

    Args:
        side: of the picture, in pixels.
        tile: of a window; a shorter picture is one window.
        margin: half of what two windows share; the last of them is pushed back inside, and may share more.
    """
    starts = [0] if side <= tile else [*range(0, side - tile, tile - 2 * margin), side - tile]
    first = 0
    for i, start in enumerate(starts):
        stop = min(start + tile, side)
        last = side if i + 1 == len(starts) else (starts[i + 1] + stop) // 2
        yield Span(start, stop, first, last)
        first = last


@functools.lru_cache(maxsize=8)
def _program(config: RRDBNetConfig, dtype: Any) -> Any:
    """The compiled network: (params, pictures, inside) -> float32; networks of the same sizes share it.

    The features of a window are made at once and enlarged strip by strip, as they take 16 times the memory then.
    """
    structure = graph(functools.partial(RRDBNet, config, dtype=dtype, param_dtype=dtype))
    rows = STEP // config.unshuffle

    @jax.jit
    def run(params: Params, pictures: jax.Array, inside: jax.Array | None) -> jax.Array:
        network = nnx.merge(structure, params)
        features = network.features(pictures.astype(dtype), inside)
        inside = jnp.ones((*features.shape[:3], 1)) if inside is None else inside
        padded, mask = (jnp.pad(array, ((0, 0), (REACH, REACH), (0, 0), (0, 0))) for array in (features, inside))

        def strip(top: jax.Array) -> jax.Array:
            seen = (jax.lax.dynamic_slice_in_dim(array, top, rows + 2 * REACH, axis=1) for array in (padded, mask))
            cut = REACH * 2**config.doublings
            return network.enlarge(*seen)[:, cut:-cut].astype(jnp.float32)

        strips = jax.lax.map(strip, jnp.arange(0, features.shape[1], rows))
        count, batch, height, width, channels = strips.shape
        enlarged: jax.Array = strips.transpose(1, 0, 2, 3, 4).reshape(batch, count * height, width, channels)
        return enlarged

    return run
