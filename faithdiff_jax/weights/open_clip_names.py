"""Text encoders in a checkpoint of one file, under transformers' names.

    cond_stage_model.model.transformer.resblocks.3.mlp.c_fc.bias         -> text_model.encoder.layers.3.mlp.fc1.bias
    conditioner.embedders.0.transformer.text_model.final_layer_norm.bias -> text_model.final_layer_norm.bias

SD 2.1's H and SDXL's bigG are named as OpenCLIP names them, with queries, keys and values in one tensor; SDXL's CLIP-L
has transformers' names already.
"""

import re
from typing import NamedTuple

import numpy as np

from faithdiff_jax.errors import InputError
from faithdiff_jax.models.clip import TextEncoderConfig
from faithdiff_jax.weights.safetensors_format import Tensor, shown
from faithdiff_jax.weights.tensor_files import Renamed, TensorSource

PREFIXES = (
    ("cond_stage_model.model.", "conditioner.embedders.0.transformer.", ""),
    ("conditioner.embedders.1.model.",),
)
"""Of the first and the second text encoder: what the names in a file may begin with."""
_OF_OPEN_CLIP, _OF_TRANSFORMERS = "positional_embedding", "text_model.embeddings.position_embedding.weight"
_ENDS = {
    _OF_OPEN_CLIP: _OF_TRANSFORMERS,
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}
_LAYER = re.compile(r"transformer\.resblocks\.([0-9]{1,4})\.(.+)")
_MODULES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_UNUSED = ("logit_scale", "attn_mask")  # of comparing texts with pictures; made anew by whoever reads the weights


class _Piece(NamedTuple):
    """Where a tensor is: all of a published one, or one of three equal parts of its rows."""

    name: str
    third: int | None = None


def text_encoder_of(source: TensorSource, number: int, config: TextEncoderConfig) -> TensorSource:
    """One of the text encoders of a file, under transformers' names.

    Args:
        source: the file.
        number: 0 for the first text encoder, 1 for SDXL's second.
        config: its sizes. A layer behind the last, which SD 2.1 does not use, is left out, and so is a projection that
            the model does not have.

    Raises:
        InputError: the file has no such text encoder.
    """
    names = source.shapes()
    for prefix in PREFIXES[number]:
        if prefix + _OF_TRANSFORMERS in names:
            return Renamed(source, lambda name, prefix=prefix: _inside(name, prefix))  # type: ignore[misc]
        if prefix + _OF_OPEN_CLIP in names:
            return _OpenCLIP(source, prefix, config)
    known = " or ".join(f"{prefix}..." for prefix in PREFIXES[number] if prefix)
    ordinal = ("first", "second")[number]
    raise InputError(f"{source.files[0]}: holds no {ordinal} text encoder, which would be named {known}")


class _OpenCLIP(TensorSource):
    """A text encoder that is named as OpenCLIP names it; names that mean nothing stay as they are, to be refused."""

    def __init__(self, source: TensorSource, prefix: str, config: TextEncoderConfig):
        self.files = source.files
        self._source = source
        self._pieces: dict[str, _Piece] = {}
        shapes = source.shapes()
        for name in shapes:
            inner = _inside(name, prefix)
            if inner is None or inner in _UNUSED or (inner == "text_projection" and config.projection is None):
                continue
            layer = _LAYER.fullmatch(inner)
            if layer is None:
                self._pieces[_ENDS.get(inner, name)] = _Piece(name)
            elif int(layer[1]) != config.layers:
                self._pieces |= _of_layer(layer, name, shapes[name])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `TensorSource`."""
        shapes, found = self._source.shapes(), {}
        for name, piece in self._pieces.items():
            shape = shapes[piece.name]
            if piece.third is not None:
                shape = (shape[0] // 3, *shape[1:])
            found[name] = shape[::-1] if name == "text_projection.weight" else shape
        return found

    def dtypes(self) -> dict[str, np.dtype]:
        """See `TensorSource`."""
        dtypes = self._source.dtypes()
        return {name: dtypes[piece.name] for name, piece in self._pieces.items()}

    def get(self, name: str) -> Tensor:
        """See `TensorSource`."""
        piece = self._pieces[name]
        array = self._source.get(piece.name)
        if piece.third is not None:
            array = np.split(array, 3)[piece.third].copy()
        return array.T if name == "text_projection.weight" else array


def _of_layer(layer: re.Match[str], name: str, shape: tuple[int, ...]) -> dict[str, _Piece]:
    """The tensors that one of a layer stands for."""
    to = f"text_model.encoder.layers.{layer[1]}"
    fused = re.fullmatch(r"attn\.in_proj_(weight|bias)", layer[2])
    if fused is not None:
        if not shape or shape[0] % 3:
            raise InputError(f"{shown(name)} is {shape}: must be queries, keys and values, of three times as many rows")
        return {f"{to}.self_attn.{part}_proj.{fused[1]}": _Piece(name, i) for i, part in enumerate("qkv")}
    module, _, kind = layer[2].rpartition(".")
    return {f"{to}.{_MODULES[module]}.{kind}" if module in _MODULES else name: _Piece(name)}


def _inside(name: str, prefix: str) -> str | None:
    return name.removeprefix(prefix) if name.startswith(prefix) else None
