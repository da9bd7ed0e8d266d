"""FaithDiff's alignment module: brings LQ features and noisy latent together at the head of the UNet.

    features --embed--> condition --\
    conv_in(latents) = hidden -------> concat -> 2 transformer blocks -> linear -> + hidden --> the rest of the UNet

The published blocks call torch's attention with its axes exchanged, so that every position attends over the samples
of the batch. `mixing` names what attends to what:

    none      each position to itself alone: what the released weights compute on one image
    batch     each position over a group of `group` samples: the published training code
    spatial   each position over the positions of its own image: as the paper describes it (section 3.2)

`Addition` takes the module's place in the paper's ablation: one convolution for each input, added. In the baselines a
network that steers the UNet does (see `steering`); `conditioning` makes the module of each kind.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from faithdiff_jax.models.attention import attention
from faithdiff_jax.models.controlnet_xs import ControlNetXSConfig
from faithdiff_jax.models.layers import Layers, quick_gelu, run_block
from faithdiff_jax.models.sizes import LARGEST_WIDTH, MOST_LAYERS, check_sizes

STEERING = ("controlnet", "controlnet_xs", "sft")
KINDS = ("transformer", "add", *STEERING)
MIXINGS = ("none", "batch", "spatial")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """Sizes of the aligner; its width is twice the UNet's first level, its input the LQ encoder's last."""

    kind: str = "transformer"
    """"transformer" for `Alignment`, "add" for `Addition`, "controlnet" for `ControlNet`, "controlnet_xs" for
    `ControlNetXS`, "sft" for `SFTControlNet`; all but the first ignore the fields that are the aligner's."""
    mixing: str = "none"
    group: int | None = None
    """Samples that attend to each other under `mixing="batch"`; None for the whole batch."""
    layers: int = 2
    heads: int = 8
    norm_groups: int = 32
    xs: ControlNetXSConfig = ControlNetXSConfig()
    """Sizes of a ControlNet-XS."""

    def __post_init__(self) -> None:
        check_sizes(self, 1, MOST_LAYERS, "layers")
        check_sizes(self, 1, LARGEST_WIDTH, "heads", "norm_groups")
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}: must be one of {', '.join(KINDS)}")
        if self.mixing not in MIXINGS:
            raise ValueError(f"mixing is {self.mixing!r}: must be one of {', '.join(MIXINGS)}")
        if self.group is not None and (self.group < 1 or self.mixing != "batch"):
            raise ValueError(f"group is {self.group}: must be at least 1, and goes with mixing 'batch' only")

    @property
    def steers(self) -> bool:
        """Whether the module steers the UNet everywhere, not at its head alone."""
        return self.kind in STEERING


class ConditionEmbedding(nnx.Module):
    """Norm, convolution, SiLU, zero-initialised convolution: LQ features at the UNet's first width."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, *, make: Layers):
        self.norm_in = make.group_norm(in_channels, groups, epsilon=1e-6)
        self.conv_in = make.conv3x3(in_channels, in_channels)
        self.conv_out = make.conv3x3(in_channels, out_channels, zeros=True)

    def __call__(self, features: Float[Array, "b h w f"]) -> Float[Array, "b h w c"]:
        """(B, h, w, in) -> (B, h, w, out)."""
        return self.conv_out(nnx.silu(self.conv_in(self.norm_in(features))))


class AlignmentBlock(nnx.Module):
    """Attention and a QuickGELU feed-forward of twice the width, each normalised before and added after."""

    def __init__(self, dim: int, heads: int, *, make: Layers):
        self.heads = heads
        self.ln_1 = make.layer_norm(dim, epsilon=1e-5)
        self.in_proj = make.linear(dim, 3 * dim)
        self.out_proj = make.linear(dim, dim)
        self.ln_2 = make.layer_norm(dim, epsilon=1e-5)
        self.c_fc = make.linear(dim, 2 * dim)
        self.c_proj = make.linear(2 * dim, dim)

    def __call__(self, tokens: Float[Array, "b n c"], mixing: str, group: int) -> Float[Array, "b n c"]:
        """(B, N, dim) -> (B, N, dim)."""
        normed = self.ln_1(tokens)
        mixed = self._values(normed) if mixing == "none" else self._mix(normed, mixing, group)
        tokens = tokens + self.out_proj(mixed)
        return tokens + self.c_proj(quick_gelu(self.c_fc(self.ln_2(tokens))))

    def _values(self, normed: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """The values alone: over a single key the softmax is one, so queries and keys do not matter."""
        dim = normed.shape[-1]
        assert self.in_proj.bias is not None
        kernel: Array = self.in_proj.kernel[:, 2 * dim :]
        bias: Array = self.in_proj.bias[2 * dim :]
        return normed @ kernel.astype(normed.dtype) + bias.astype(normed.dtype)[None, None]

    def _mix(self, normed: Float[Array, "b n c"], mixing: str, group: int) -> Float[Array, "b n c"]:
        q, k, v = jnp.split(self.in_proj(normed), 3, axis=-1)
        batch, positions, dim = q.shape
        if mixing == "spatial":
            shape = (batch, positions, self.heads, dim // self.heads)
            return attention(q.reshape(shape), k.reshape(shape), v.reshape(shape)).reshape(q.shape)

        def by_position(x: Array) -> Array:  # (B, N, dim) -> (B/group * N, group, heads, dim/heads)
            groups = x.reshape(batch // group, group, positions, dim).swapaxes(1, 2)
            return groups.reshape(-1, group, self.heads, dim // self.heads)

        mixed = attention(by_position(q), by_position(k), by_position(v))
        return mixed.reshape(batch // group, positions, group, dim).swapaxes(1, 2).reshape(q.shape)


class Alignment(nnx.Module):
    """The alignment module (section 3.2, equation 1; the sum is taken as in the published code)."""

    def __init__(
        self,
        config: AlignmentConfig,
        feature_channels: int,
        hidden_channels: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        make = Layers(rngs, dtype, param_dtype)
        width = 2 * hidden_channels
        if width % config.heads:
            raise ValueError(f"heads is {config.heads}: must divide the aligner's width, {width}")
        if feature_channels % config.norm_groups:
            raise ValueError(f"norm_groups is {config.norm_groups}: must divide the features' {feature_channels}")
        self.config = config
        self.condition_embedding = ConditionEmbedding(feature_channels, hidden_channels, config.norm_groups, make=make)
        self.blocks = nnx.List([AlignmentBlock(width, config.heads, make=make) for _ in range(config.layers)])
        self.spatial_ch_projs = make.linear(width, hidden_channels, zeros=True)

    def embed(self, features: Float[Array, "b h w f"]) -> Float[Array, "b h w c"]:
        """LQ features (B, h, w, feature_channels) -> condition (B, h, w, hidden_channels); once an image."""
        return run_block(self.condition_embedding, features)

    def __call__(
        self, hidden: Float[Array, "b h w c"], condition: Float[Array, "b h w c"], *, group: int | None = None
    ) -> Float[Array, "b h w c"]:
        """Aligned hidden state, in place of the UNet's own.

        Args:
            hidden: (B, h, w, hidden_channels), the UNet's `conv_in` of the latents.
            condition: (B, h, w, hidden_channels), from `embed`.
            group: overrides the config's group under `mixing="batch"`; must divide B.

        Returns:
            (B, h, w, hidden_channels).
        """
        batch, height, width, channels = hidden.shape
        group = group or self.config.group or batch
        if self.config.mixing == "batch" and batch % group:
            raise ValueError(f"group is {group}: must divide the batch, {batch}")
        tokens = jnp.concatenate([hidden, condition], axis=-1).reshape(batch, height * width, 2 * channels)
        for block in self.blocks:
            tokens = run_block(block, tokens, call=lambda block, tokens: block(tokens, self.config.mixing, group))
        return hidden + self.spatial_ch_projs(tokens).reshape(hidden.shape)


class Addition(nnx.Module):
    """The paper's model without the alignment module: one convolution for each input, added.

    The UNet's own convolution makes `hidden`; that of the features starts at zero, so that training starts from the
    plain UNet.
    """

    def __init__(
        self,
        feature_channels: int,
        hidden_channels: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.conv = Layers(rngs, dtype, param_dtype).conv3x3(feature_channels, hidden_channels, zeros=True)

    def embed(self, features: Float[Array, "b h w f"]) -> Float[Array, "b h w c"]:
        """LQ features (B, h, w, feature_channels) -> condition (B, h, w, hidden_channels); once an image."""
        return self.conv(features)

    def __call__(
        self, hidden: Float[Array, "b h w c"], condition: Float[Array, "b h w c"], *, group: int | None = None
    ) -> Float[Array, "b h w c"]:
        """The sum, (B, h, w, hidden_channels); `group` is as in `Alignment`, of samples that are not mixed here."""
        return hidden + condition
