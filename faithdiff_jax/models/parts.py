"""The parts of a model: their names, how each is built and shaped, and how it is run on parameters.

    unet, alignment, lq_encoder, vae, text_encoder, text_encoder_2

Parameters are nested dictionaries of arrays; dotted paths name their leaves.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from faithdiff_jax.errors import InputError
from faithdiff_jax.models.clip import TextEncoder
from faithdiff_jax.models.conditioning import make_alignment
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.faithdiff import Denoiser
from faithdiff_jax.models.lq_encoder import HintEncoder, make_lq_encoder
from faithdiff_jax.models.unet import UNet
from faithdiff_jax.models.vae import VAE, FeatureEncoder

Module = TypeVar("Module", bound=nnx.Module)

Params = dict[Any, Any]
"""Nested dictionary of arrays, as `nnx.to_pure_dict` gives; the keys of lists are integers."""


def builders(config: FaithDiffConfig) -> dict[str, Callable[..., Any]]:
    """Part name -> what builds its module, with `rngs`, `dtype` and `param_dtype` as keywords.

    The parts are unet, alignment, lq_encoder, vae and the text encoders: text_encoder, text_encoder_2.
    """
    text_encoders = zip(text_encoder_names(config), config.text_encoders, strict=True)
    return {
        "unet": functools.partial(UNet, config.unet),
        "alignment": functools.partial(make_alignment, config.alignment, config.unet, config.channels_to_embed),
        "lq_encoder": functools.partial(make_lq_encoder, config.lq_encoder_config, config.lq_features),
        "vae": functools.partial(VAE, config.vae),
        **{name: functools.partial(TextEncoder, encoder) for name, encoder in text_encoders},
    }


def part_names(config: FaithDiffConfig) -> tuple[str, ...]:
    """The parts of a model: unet, alignment, lq_encoder, vae, text_encoder, text_encoder_2."""
    return tuple(builders(config))


def text_encoder_names(config: FaithDiffConfig) -> tuple[str, ...]:
    """The parts that encode text, in their order."""
    return numbered("text_encoder", len(config.text_encoders))


def numbered(name: str, count: int) -> tuple[str, ...]:
    """`tokenizer`, `tokenizer_2`, ...: as diffusers numbers folders."""
    return (name, *(f"{name}_{i}" for i in range(2, count + 1)))


def part_shapes(config: FaithDiffConfig, part: str) -> dict[str, tuple[int, ...]]:
    """Dotted path -> shape of every parameter of a part. Nothing is computed or held.

    Raises:
        InputError: sizes that do not go together.
    """
    return dict(_part_shapes(config, part))


@functools.cache
def _part_shapes(config: FaithDiffConfig, part: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """`part_shapes`, kept: seconds of tracing at full size, asked for by whoever reads, places or checks a part."""
    build = builders(config).get(part)
    if build is None:
        raise InputError(f"part is {part!r}: must be one of {', '.join(part_names(config))}")
    try:
        return tuple(module_shapes(build).items())
    except ValueError as error:
        raise InputError(f"{part}: {error}") from None


def module_shapes(build: Callable[..., nnx.Module]) -> dict[str, tuple[int, ...]]:
    """Dotted path -> shape of every parameter of the module that `build(rngs=...)` makes."""
    state = nnx.to_pure_dict(nnx.state(_without_arrays(build), nnx.Param))
    return {path: leaf.shape for path, leaf in flatten(state).items()}


class Networks:
    """Modules that compute in `dtype` on parameters of any dtype: of the part that a method is named for."""

    def __init__(self, config: FaithDiffConfig, dtype: Any):
        def of(build: Callable[..., Module]) -> nnx.GraphDef[Module]:
            return graph(functools.partial(build, dtype=dtype, param_dtype=dtype))

        parts = builders(config)
        self._lq_encoder = of(parts["lq_encoder"])
        self._vae = of(parts["vae"])
        self._denoiser = of(functools.partial(Denoiser, config.unet, config.alignment, config.channels_to_embed))
        self._text_encoders = [of(parts[name]) for name in text_encoder_names(config)]

    def lq_encoder(self, params: Params) -> FeatureEncoder | HintEncoder:
        """Images to LQ features."""
        module: FeatureEncoder | HintEncoder = nnx.merge(self._lq_encoder, params)
        return module

    def vae(self, params: Params) -> VAE:
        """Images to latents and back."""
        module: VAE = nnx.merge(self._vae, params)
        return module

    def denoiser(self, params: Params) -> Denoiser:
        """Alignment module and UNet, from {"unet": ..., "alignment": ...}."""
        return nnx.merge(self._denoiser, params)

    def encode_text(
        self,
        params: Sequence[Params],
        token_ids: Sequence[Int[Array, "b m"]],
        constrain: Callable[[Array], Array] = lambda x: x,
    ) -> tuple[Float[Array, "b m d"], Float[Array, "b p"]]:
        """Token ids (B, 77), for each text encoder as its parameters -> context (B, 77, D) and pooled (B, P).

        `constrain` lays a batch out over devices.
        """
        encoders = [nnx.merge(graph, part) for graph, part in zip(self._text_encoders, params, strict=True)]
        outputs = [encoder(constrain(ids), constrain) for encoder, ids in zip(encoders, token_ids, strict=True)]
        return jnp.concatenate([hidden for hidden, _ in outputs], axis=-1), outputs[-1][1]


def graph(build: Callable[..., Module]) -> nnx.GraphDef[Module]:
    """The structure of the module that `build(rngs=...)` makes, without its parameters, which no memory is spent on."""
    return nnx.split(_without_arrays(build))[0]


class _OneKey(nnx.RngStream):
    """Gives every layer the same key.

    For shapes alone any key will do. NNX's own stream counts its keys: to set that count while tracing, it looks
    through all that was traced before, which took most of the time of building a UNet of SDXL's size.
    """

    def __call__(self) -> jax.Array:
        return self.key[...]


def _without_arrays(build: Callable[..., Module]) -> Module:
    """The module that `build(rngs=...)` makes, with shapes in place of its parameters."""

    def module() -> Module:
        rngs = nnx.Rngs()
        setattr(rngs, "default", _OneKey(0, tag="default"))  # noqa: B010 - it takes streams of no class of ours
        return build(rngs=rngs)

    built: Module = nnx.eval_shape(module)
    return built


def flatten(params: Params, prefix: str = "") -> dict[str, Any]:
    """Nested parameters -> {"down_blocks.0.resnets.1.conv1.kernel": leaf}."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, path + ".") if isinstance(value, dict) else {path: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`: numbers in a path become integer keys again."""
    params: Params = {}
    for path, leaf in flat.items():
        *parents, name = (int(part) if part.isdigit() else part for part in path.split("."))
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return params
