"""RRDBNet out of the two files that ncnn reads, NAME.param and NAME.bin: Real-ESRGAN's are distributed so.

NAME.param    text: a magic number, the counts of layers and blobs, then a line per layer: type, name, blobs, key=value
NAME.bin      for each convolution in their order: a tag, its weights (O, I, 3, 3), its biases as float32

The network is told by the order of its layers, which are the same for every RRDBNet; what else ncnn can describe is
refused. Source: ncnn's documentation of its file formats.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from faithdiff_jax.baselines.rrdbnet import DENSE_BLOCKS, RESIDUAL, SLOPE
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.reading import read_text, require_file
from faithdiff_jax.models.sizes import LARGEST_WIDTH, MOST_LAYERS
from faithdiff_jax.weights.safetensors_format import Place, read_tensor, shown
from faithdiff_jax.weights.tensor_files import TensorSource

MAGIC = "7767517"
PARAM_LIMIT = 1 << 22  # bytes; x4plus has a tenth of a megabyte
# What stands before the weights of a layer: their type.
TAGS: dict[int, np.dtype[Any]] = {0x01306B47: np.dtype("<f2"), 0: np.dtype("<f4"), 0x0002C056: np.dtype("<f4")}

_HEAD, _TAIL = 1, 5  # convolutions before the dense blocks (conv_first), and after them
_CONVOLUTIONS = 5  # of a dense block

Options = Mapping[str, tuple[float, ...]]
"""What is said of a layer: key -> value, or the count and values of an array."""

# Of a convolution: kernel, padding, bias; of one that an activation follows, its kind and slope too.
_LINEAR: Options = {"1": (3,), "4": (1,), "5": (1,)}
_ACTIVATED: Options = {**_LINEAR, "9": (2,), "-23310": (1, SLOPE)}
_SUM: Options = {"0": (1,), "-23301": (2, RESIDUAL, 1)}
_NEAREST_TWICE: Options = {"0": (1,), "1": (2,), "2": (2,)}


class Layer(NamedTuple):
    """A line of NAME.param."""

    kind: str
    name: str
    options: Options


class NcnnFiles(TensorSource):
    """The weights of an RRDBNet under the tensor names of Real-ESRGAN.

    Args:
        param: NAME.param, with NAME.bin beside it.

    Raises:
        InputError: a file that is missing, damaged or too short, a network other than RRDBNet, or weights of a type
            that is not float16 or float32.
    """

    def __init__(self, param: pathlib.Path):
        weights = param.with_suffix(".bin")
        self.files = (param, weights)
        convolutions = _convolutions(param)
        size = require_file(weights, "file of ncnn's weights")
        self._places: dict[str, Place] = {}
        at = 0
        names = _tensor_names((len(convolutions) - _HEAD - _TAIL) // (_CONVOLUTIONS * DENSE_BLOCKS))
        with weights.open("rb") as file:
            for name, layer in zip(names, convolutions, strict=True):
                outputs, count = _sizes(param, layer)
                file.seek(at)
                tag = int.from_bytes(file.read(4), "little")
                if at + 4 <= size and tag not in TAGS:
                    raise InputError(f"{weights}: {shown(layer.name)} has weights of type {tag:#x}: must be float16")
                kernel = Place(TAGS.get(tag, TAGS[0]), (outputs, count // (outputs * 9), 3, 3), at + 4)
                # Layers begin at multiples of four bytes.
                bias = Place(TAGS[0], (outputs,), kernel.start + math.ceil(kernel.size / 4) * 4)
                at = bias.start + bias.size
                if at > size:
                    raise InputError(f"{weights}: cut short ({shown(layer.name)} ends at byte {at} of {size})")
                self._places |= {f"{name}.weight": kernel, f"{name}.bias": bias}
        if at != size:
            raise InputError(f"{weights}: has {size} bytes, the layers of {param.name} need {at}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `TensorSource`."""
        return {name: place.shape for name, place in self._places.items()}

    def dtypes(self) -> dict[str, np.dtype]:
        """See `TensorSource`."""
        return {name: place.dtype for name, place in self._places.items()}

    def get(self, name: str) -> np.ndarray:
        """See `TensorSource`."""
        return read_tensor(self.files[1], self._places[name])


def _convolutions(param: pathlib.Path) -> list[Layer]:
    """The convolutions of NAME.param in their order; InputError unless all of its layers are those of an RRDBNet."""
    layers = [layer for layer in _layers(param) if layer.kind != "Split"]  # which only lets a blob be read twice
    convolutions = [layer for layer in layers if layer.kind == "Convolution"]
    blocks, left = divmod(len(convolutions) - _HEAD - _TAIL, _CONVOLUTIONS * DENSE_BLOCKS)
    expected = _expected(blocks) if not left and 1 <= blocks <= MOST_LAYERS else []
    if not expected or [kind for kind, _ in expected] != [layer.kind for layer in layers]:
        raise InputError(f"{param}: holds another network than RRDBNet ({len(convolutions)} convolutions)")
    for layer, (kind, wanted) in zip(layers, expected, strict=True):
        found = {key: value for key, value in layer.options.items() if kind != "Convolution" or key not in ("0", "6")}
        same = found.keys() == wanted.keys() and all(
            len(found[key]) == len(wanted[key])
            and all(abs(a - b) < 1e-6 for a, b in zip(found[key], wanted[key], strict=True))
            for key in wanted
        )
        if not same:
            raise InputError(f"{param}: {shown(layer.name)} is another {kind} than RRDBNet has there")
    return convolutions


def _expected(blocks: int) -> list[tuple[str, Options]]:
    """The layers of an RRDBNet: their types, and what is said of each."""
    linear, activated, total = ("Convolution", _LINEAR), ("Convolution", _ACTIVATED), ("Eltwise", _SUM)
    concat: tuple[str, Options] = ("Concat", {})
    dense = [*[activated, concat] * (_CONVOLUTIONS - 1), linear, total]
    twice = [("Interp", _NEAREST_TWICE), activated]
    body = [*dense * DENSE_BLOCKS, total] * blocks
    return [("Input", {}), linear, *body, linear, ("BinaryOp", {}), *twice * 2, activated, linear]


def _tensor_names(blocks: int) -> list[str]:
    """Real-ESRGAN's names of the convolutions."""
    body = [
        f"body.{block}.rdb{dense}.conv{conv}"
        for block in range(blocks)
        for dense in range(1, DENSE_BLOCKS + 1)
        for conv in range(1, _CONVOLUTIONS + 1)
    ]
    return ["conv_first", *body, "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]


def _layers(param: pathlib.Path) -> list[Layer]:
    magic, *lines = read_text(param, PARAM_LIMIT, "file of ncnn's layers").split("\n")
    if magic.strip() != MAGIC:
        raise InputError(f"{param}: not a file of ncnn's layers (it must begin with {MAGIC})")
    layers = [_layer(param, line.split()) for line in lines[1:] if line.strip()]
    count = lines[0].split()[:1] if lines else []
    if count != [str(len(layers))]:
        raise InputError(f"{param}: cut short or damaged (it has {len(layers)} layers, and says {shown(count)})")
    return layers


def _layer(param: pathlib.Path, words: list[str]) -> Layer:
    try:
        kind, name, inputs, outputs = words[:4]
        pairs = [option.split("=") for option in words[4 + int(inputs) + int(outputs) :]]
        return Layer(kind, name, {key: tuple(map(float, value.split(","))) for key, value in pairs})
    except ValueError:
        raise InputError(f"{param}: not a layer: {shown(' '.join(words))}") from None


def _sizes(param: pathlib.Path, layer: Layer) -> tuple[int, int]:
    """Output channels and weights of a 3x3 convolution."""
    outputs, count = (layer.options.get(key, (0.0,))[0] for key in ("0", "6"))
    if not (1 <= outputs <= LARGEST_WIDTH and outputs <= count <= LARGEST_WIDTH**2) or count % (outputs * 9):
        raise InputError(f"{param}: {shown(layer.name)} has {outputs:g} channels and {count:g} weights, in 3x3 kernels")
    return int(outputs), int(count)
