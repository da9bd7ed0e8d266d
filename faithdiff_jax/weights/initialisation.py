"""The parts of FaithDiff before any training of its own: LQ encoder from the VAE, aligner as its layers start.

For the converter under published names, tensor by tensor; for training under our own (`fresh_part`).
"""

import math
from collections.abc import Mapping

import numpy as np

from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import part_shapes
from faithdiff_jax.weights import rules
from faithdiff_jax.weights.keymap import KeyMap
from faithdiff_jax.weights.tensor_files import Arrays, Renamed, TensorSource

# The LQ encoder is the VAE's encoder up to here.
_BEYOND_FEATURES = ("conv_norm_out.", "conv_out.")
_ZERO = ("condition_embedding.conv_out.", "spatial_ch_projs.")
_NORMS = (".norm_in.", ".ln_1.", ".ln_2.")
_ZERO_BIASES = (".attn.in_proj_bias", ".attn.out_proj.bias")


def fresh_part(config: FaithDiffConfig, part: str, vae: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The aligner or the LQ encoder before any training, of whatever kind the config names.

    Args:
        config: the architecture.
        part: "alignment", as `initial_alignment` makes it (zeros for kind "add"), float32; or "lq_encoder", what the
            VAE's encoder has under the same names, in its dtype.
        vae: dotted path -> array of the part `vae`; for the LQ encoder.
        seed: of the aligner.

    Returns:
        Dotted path -> array for every parameter of the part.
    """
    if part not in ("alignment", "lq_encoder"):
        raise ValueError(f"part is {part!r}: must be alignment or lq_encoder, the others are never made anew")
    shapes = part_shapes(config, part)
    if part == "lq_encoder":
        return {path: vae[f"encoder.{path}"] for path in shapes}
    if config.alignment.kind == "add":
        return {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    keymap = KeyMap(rules.ALIGNMENT, shapes)
    return dict(keymap.read(initial_alignment(keymap.published_shapes(), seed).get))


def lq_encoder_from_vae(vae: TensorSource) -> TensorSource:
    """The VAE's encoder under the LQ encoder's published names."""

    def rename(name: str) -> str | None:
        inner = name.removeprefix("encoder.")
        return None if inner == name or inner.startswith(_BEYOND_FEATURES) else f"denoise_encoder.{inner}"

    return Renamed(vae, rename)


def initial_alignment(shapes: Mapping[str, tuple[int, ...]], seed: int) -> TensorSource:
    """An untrained aligner, float32.

    Linear layers and convolutions are uniform in +-1/sqrt(inputs), weight and bias; the fused attention projection
    is Xavier-uniform, and attention's biases zero; norms are the identity; the convolution that ends the condition
    embedding and the last projection are zero, so that training starts from the plain UNet. Source: the published
    module, whose layers start as torch's do.

    Args:
        shapes: published name -> shape of the aligner's tensors.
        seed: the same seed gives the same numbers on any machine.
    """
    rng = np.random.default_rng(seed)
    return Arrays({name: _initial(name, shapes, rng) for name in sorted(shapes)})


def _initial(name: str, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator) -> np.ndarray:
    shape = shapes[name]
    is_weight = name.endswith("weight")
    if any(part in name for part in _NORMS):
        return np.full(shape, 1.0 if is_weight else 0.0, np.float32)
    if name.startswith(_ZERO) or name.endswith(_ZERO_BIASES):
        return np.zeros(shape, np.float32)
    if name.endswith(".attn.in_proj_weight"):
        bound = math.sqrt(6 / (shape[0] + shape[1]))
    else:
        weight = shape if is_weight else shapes[name.removesuffix("bias") + "weight"]
        bound = 1 / math.sqrt(math.prod(weight[1:]))
    return rng.uniform(-bound, bound, shape).astype(np.float32)
