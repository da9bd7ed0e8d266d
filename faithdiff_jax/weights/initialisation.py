"""Parameters before any training: FaithDiff's own parts as published, and whole models that have learned nothing yet.

the VAE -> LQ encoder; seed -> aligner                  for the converter under published names, tensor by tensor
architecture + seed -> fresh_params -> write_model      for models that are trained from the start
"""

import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.tokenizers import Tokenizers
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import builders, flatten, numbered, part_shapes, text_encoder_names
from faithdiff_jax.weights import rules
from faithdiff_jax.weights.keymap import KeyMap, compare
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.safetensors_format import Tensor
from faithdiff_jax.weights.stored_files import Contents
from faithdiff_jax.weights.tensor_files import Arrays, Renamed, TensorSource

# The ends of residual branches, and of the UNet: zero, so that networks start short.
_UNET_ZEROS = ("conv2.kernel", "proj_out.kernel", "conv_out.kernel")
_VAE_ZEROS = ("conv2.kernel", "to_out.kernel")
_LOG_VARIANCE = -6.0
ENCODER_COPY = "encoder."
"""Before the paths of a steering network's copy of the UNet's encoder half."""
# The LQ encoder is the VAE's encoder up to here.
_BEYOND_FEATURES = ("conv_norm_out.", "conv_out.")
_ZERO = ("condition_embedding.conv_out.", "spatial_ch_projs.")
_NORMS = (".norm_in.", ".ln_1.", ".ln_2.")
_ZERO_BIASES = (".attn.in_proj_bias", ".attn.out_proj.bias")


def fresh_part(
    config: FaithDiffConfig, part: str, stored: Callable[[str], Mapping[str, Tensor]], seed: int
) -> dict[str, Tensor]:
    """The alignment module or the LQ encoder before any training, of whatever kind the config names.

    Args:
        config: the architecture.
        part: "alignment", as `initial_alignment` makes it (zeros for kind "add"), float32; in a network that steers the
            UNet, what the UNet has under the same names. Or "lq_encoder", what the VAE's encoder has under the same
            names, in its dtype; for `lq_features` "hint" as its layers start by themselves.
        stored: part -> dotted path -> array: of the parts `vae` and `unet`, asked for where something is copied.
        seed: of what is drawn.

    Returns:
        Dotted path -> array for every parameter of the part.
    """
    if part not in ("alignment", "lq_encoder"):
        raise ValueError(f"part is {part!r}: must be alignment or lq_encoder, the others are never made anew")
    if part == "lq_encoder":
        if config.lq_features == "hint":
            return _drawn(config, part, seed)
        return _copied(part, "encoder.", part_shapes(config, part), stored("vae"), "this VAE's encoder")
    if config.alignment.steers:
        own = part_shapes(config, part).items()
        wanted = {path.removeprefix(ENCODER_COPY): shape for path, shape in own if path.startswith(ENCODER_COPY)}
        copied = _copied(part, "", wanted, stored("unet"), "this UNet") if wanted else {}
        # Compiled, so that what is left out is never made: half of a UNet.
        drawn = jax.jit(lambda: _as_layers_start(config, part, seed, without=ENCODER_COPY))()
        rest = {path: np.asarray(array) for path, array in drawn.items()}
        return rest | {f"{ENCODER_COPY}{path}": copied[path] for path in wanted}
    shapes = part_shapes(config, part)
    if config.alignment.kind == "add":
        return {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    keymap = KeyMap(rules.ALIGNMENT, shapes)
    return dict(keymap.read(initial_alignment(keymap.published_shapes(), seed).get))


def _copied(
    part: str, prefix: str, shapes: Mapping[str, tuple[int, ...]], source: Mapping[str, Tensor], origin: str
) -> dict[str, Tensor]:
    """What `source` has at each path behind a prefix."""
    wanted = {f"{prefix}{path}": shape for path, shape in shapes.items()}
    faults = compare(wanted, {path: source[path].shape for path in wanted if path in source})
    if faults:
        raise InputError(f"{part}: cannot start from {origin}, its sizes differ: {faults[0]}")
    return {path: source[f"{prefix}{path}"] for path in shapes}


def _as_layers_start(config: FaithDiffConfig, part: str, seed: int, *, without: str | None = None) -> dict[str, Any]:
    """The parameters that a part's module is built with, float32; but for those whose paths start with `without`."""
    module = builders(config)[part](rngs=nnx.Rngs(_key(seed, part)))
    flat = flatten(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    return {path: leaf for path, leaf in flat.items() if without is None or not path.startswith(without)}


def _drawn(config: FaithDiffConfig, part: str, seed: int) -> dict[str, Tensor]:
    return {path: np.asarray(leaf) for path, leaf in _as_layers_start(config, part, seed).items()}


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


def _initial(name: str, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator) -> Tensor:
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


def fresh_params(config: FaithDiffConfig, seed: int) -> dict[str, dict[str, Tensor]]:
    """The parameters of every part, by part name, float32.

    The LQ encoder is a copy of the VAE's encoder and the aligner starts as published. In UNet and VAE the ends of the
    residual branches are zero, and the UNet's last layer (as in Ho et al. 2020's code). The VAE's latents start with
    little noise of their own. Token embeddings have unit variance, which is what the UNet sees of a text encoder that
    is never trained. The rest is as the layers start by themselves.
    """
    unet = _with_zeros(_drawn(config, "unet", seed), _UNET_ZEROS)
    vae = _with_zeros(_drawn(config, "vae", seed), _VAE_ZEROS)
    is_log_variance = np.arange(2 * config.vae.latent_channels) >= config.vae.latent_channels
    vae["quant_conv.bias"] = np.where(is_log_variance, np.float32(_LOG_VARIANCE), np.float32(0))
    params = {"vae": vae, "unet": unet}
    params |= {part: fresh_part(config, part, params.__getitem__, seed) for part in ("alignment", "lq_encoder")}
    for name in text_encoder_names(config):
        text = _drawn(config, name, seed)
        rng = np.random.default_rng([seed, *name.encode()])
        tokens = text["token_embedding.embedding"]
        text["token_embedding.embedding"] = rng.standard_normal(tokens.shape).astype(np.float32)
        params[name] = text
    return params


def write_model(
    config: FaithDiffConfig,
    params: Mapping[str, Mapping[str, Tensor]],
    tokenizers_from: pathlib.Path | str,
    output: pathlib.Path | str,
    provenance: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Write a model directory from parameters in memory, whole or not at all.

    Args:
        config: the architecture.
        params: part name -> dotted path -> array; every part of the architecture, exactly.
        tokenizers_from: a folder with a `tokenizer/` for each text encoder.
        output: the model directory; it must not exist, or be empty.
        provenance: plain data on where the parameters are from; the package's version is added.
        defaults: the model's own defaults of restoring, plain data.

    Raises:
        ValueError: parameters that are not the architecture's.
        InputError: an output that exists or cannot be written, or tokenizers that do not fit.
    """
    check_tokenizers(config, tokenizers_from)
    parts = {part: Contents.of(arrays) for part, arrays in params.items()}
    ModelDirectory.write(output, config, parts, tokenizers=tokenizers_from, provenance=provenance, defaults=defaults)


def check_tokenizers(config: FaithDiffConfig, folder: pathlib.Path | str) -> None:
    """See that there is a tokenizer for each text encoder whose tokens and end token are the encoder's; InputError."""
    for path, encoder in zip(_tokenizer_folders(config, folder), config.text_encoders, strict=True):
        ids = Tokenizers.load([path])(["a"])[0]
        if ids.max() >= encoder.vocab_size or encoder.end_token not in ids:
            raise InputError(
                f"{path}: its tokens do not fit the text encoder's vocab_size, {encoder.vocab_size}, and end_token, "
                f"{encoder.end_token}"
            )


def _tokenizer_folders(config: FaithDiffConfig, folder: pathlib.Path | str) -> list[pathlib.Path]:
    return [pathlib.Path(folder) / name for name in numbered("tokenizer", len(config.text_encoders))]


def _with_zeros(arrays: Mapping[str, Tensor], ends: tuple[str, ...]) -> dict[str, Tensor]:
    return {path: np.zeros_like(array) if path.endswith(ends) else array for path, array in arrays.items()}


def _key(seed: int, name: str) -> jax.Array:
    """A key for each part, so that one part's size does not bear on another's numbers."""
    return jax.random.fold_in(jax.random.key(seed), int.from_bytes(name.encode()[-4:], "big"))
