"""The rules of each model: one list apiece, published name first. What a rule means is said in `keymap`."""

from faithdiff_jax.errors import InputError
from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.weights.keymap import (
    CONV,
    EMBEDDING,
    FUSED_PROJECTION,
    LINEAR,
    LINEAR_WITHOUT_BIAS,
    NORM,
    Kind,
    Rule,
)


def _same(kind: Kind, *names: str) -> list[Rule]:
    return [Rule(name, name, kind) for name in names]


def _resnet(prefix: str, ours: str | None = None) -> list[Rule]:
    parts = (
        _same(NORM, "norm1", "norm2") + _same(CONV, "conv1", "conv2", "conv_shortcut") + _same(LINEAR, "time_emb_proj")
    )
    return [rule.under(prefix + ".resnets.{r}.", (ours or prefix) + ".resnets.{r}.") for rule in parts]


def _transformer(prefix: str, ours: str | None = None) -> list[Rule]:
    layer = _same(NORM, "norm1", "norm2", "norm3")
    for name in ("attn1", "attn2"):
        layer += _same(LINEAR_WITHOUT_BIAS, f"{name}.to_q", f"{name}.to_k", f"{name}.to_v")
        layer.append(Rule(f"{name}.to_out.0", f"{name}.to_out", LINEAR))
    layer += [Rule("ff.net.0.proj", "ff.proj_in", LINEAR), Rule("ff.net.2", "ff.proj_out", LINEAR)]
    parts = _same(NORM, "norm") + _same(LINEAR, "proj_in", "proj_out")
    parts += [rule.under("transformer_blocks.{*}.", "blocks.") for rule in layer]
    return [rule.under(prefix + ".attentions.{a}.", (ours or prefix) + ".attentions.{a}.") for rule in parts]


def _pixel_attention() -> list[Rule]:
    parts = [*_same(NORM, "group_norm"), *_same(LINEAR, "to_q", "to_k", "to_v"), Rule("to_out.0", "to_out", LINEAR)]
    return [rule.under("mid_block.attentions.0.", "mid_block.attention.") for rule in parts]


def _resample(prefix: str) -> list[Rule]:
    name = "downsamplers" if prefix.startswith("down") else "upsamplers"
    return [Rule(f"{prefix}.{name}.0.conv", f"{prefix}.resample.conv", CONV)]


_ENCODER_HALF: list[Rule] = [
    *_same(CONV, "conv_in"),
    *_same(LINEAR, "time_embedding.linear_{i}", "add_embedding.linear_{i}"),
    *_resnet("down_blocks.{b}"),
    *_transformer("down_blocks.{b}"),
    *_resample("down_blocks.{b}"),
    *_resnet("mid_block"),
    *_transformer("mid_block"),
]

UNET: list[Rule] = [
    *_ENCODER_HALF,
    *_same(LINEAR_WITHOUT_BIAS, "time_embedding.cond_proj"),
    *_resnet("up_blocks.{b}"),
    *_transformer("up_blocks.{b}"),
    *_resample("up_blocks.{b}"),
    *_same(NORM, "conv_norm_out"),
    *_same(CONV, "conv_out"),
]

LQ_ENCODER: list[Rule] = [
    *_same(CONV, "conv_in"),
    *_resnet("down_blocks.{b}"),
    *_resample("down_blocks.{b}"),
    *_resnet("mid_block"),
    *_pixel_attention(),
]

_DECODER: list[Rule] = [
    *_same(CONV, "conv_in", "conv_out"),
    *_resnet("mid_block"),
    *_pixel_attention(),
    *_resnet("up_blocks.{b}"),
    *_resample("up_blocks.{b}"),
    *_same(NORM, "conv_norm_out"),
]

VAE: list[Rule] = [
    *_same(CONV, "quant_conv", "post_quant_conv"),
    *(rule.under("encoder.", "encoder.") for rule in LQ_ENCODER),
    *_same(NORM, "encoder.conv_norm_out"),
    *_same(CONV, "encoder.conv_out"),
    *(rule.under("decoder.", "decoder.") for rule in _DECODER),
]

_ALIGNMENT_BLOCK: list[Rule] = [
    *_same(NORM, "ln_1", "ln_2"),
    Rule("attn.in_proj", "in_proj", FUSED_PROJECTION),
    Rule("attn.out_proj", "out_proj", LINEAR),
    Rule("mlp.c_fc", "c_fc", LINEAR),
    Rule("mlp.c_proj", "c_proj", LINEAR),
]

ALIGNMENT: list[Rule] = [
    *_same(NORM, "condition_embedding.norm_in"),
    *_same(CONV, "condition_embedding.conv_in", "condition_embedding.conv_out"),
    # The published name is spelt so.
    *(rule.under("information_transformer_layes.{n}.", "blocks.{n}.") for rule in _ALIGNMENT_BLOCK),
    *_same(LINEAR, "spatial_ch_projs"),
]

_CLIP_LAYER: list[Rule] = [
    *_same(NORM, "layer_norm1", "layer_norm2"),
    *(Rule(f"self_attn.{name}", name, LINEAR) for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    *(Rule(f"mlp.{name}", name, LINEAR) for name in ("fc1", "fc2")),
]

TEXT_ENCODER: list[Rule] = [
    *(Rule(f"text_model.embeddings.{name}", name, EMBEDDING) for name in ("token_embedding", "position_embedding")),
    *(rule.under("text_model.encoder.layers.{*}.", "blocks.") for rule in _CLIP_LAYER),
    Rule("text_model.final_layer_norm", "final_layer_norm", NORM),
    *_same(LINEAR_WITHOUT_BIAS, "text_projection"),
]

FAITHDIFF_PARTS: dict[str, list[Rule]] = {
    "lq_encoder": [rule.under("denoise_encoder.") for rule in LQ_ENCODER],
    "alignment": ALIGNMENT,
    "unet": UNET,
}
"""The parts of `FaithDiff.bin`, each with its published names."""


HINT: list[Rule] = _same(CONV, "conv_in", "conv_out", "blocks.{n}")

CONTROLNET: list[Rule] = [
    *(rule.under("", "encoder.") for rule in _ENCODER_HALF),
    *_same(CONV, "controlnet_down_blocks.{n}", "controlnet_mid_block"),
]

_EXCHANGE: list[Rule] = _same(CONV, "base_to_ctrl.{n}", "ctrl_to_base.{n}")

CONTROLNET_XS: list[Rule] = [
    *_same(CONV, "conv_in", "control_to_base_for_conv_in"),
    *_same(LINEAR, "time_embedding.linear_{i}"),
    *_resnet("down_blocks.{b}"),
    *_transformer("down_blocks.{b}"),
    Rule("down_blocks.{b}.downsamplers.conv", "down_blocks.{b}.resample.conv", CONV),
    *(rule.under("down_blocks.{b}.", "down_blocks.{b}.") for rule in _EXCHANGE),
    *_resnet("mid_block.midblock", "mid_block"),
    *_transformer("mid_block.midblock", "mid_block"),
    *_same(CONV, "mid_block.base_to_ctrl", "mid_block.ctrl_to_base"),
    *(rule.under("up_connections.{b}.", "up_connections.{b}.") for rule in _EXCHANGE),
]

_LQ_ENCODERS = {
    "penultimate": FAITHDIFF_PARTS["lq_encoder"],
    "hint": [rule.under("controlnet_cond_embedding.") for rule in HINT],
}
_ALIGNMENTS = {AlignmentConfig.kind: ALIGNMENT, "controlnet": CONTROLNET, "controlnet_xs": CONTROLNET_XS}
_STEERING_PARTS = "lq_encoder", "alignment"
LAYOUTS = {
    AlignmentConfig.kind: ("penultimate", tuple(FAITHDIFF_PARTS)),
    "controlnet": ("hint", _STEERING_PARTS),
    "controlnet_xs": ("hint", _STEERING_PARTS),
}
"""Of each `alignment.kind` that is published: with which `lq_features`, and the parts in one file."""


def of_part(part: str, config: FaithDiffConfig = FaithDiffConfig()) -> list[Rule]:  # noqa: B008 - frozen
    """The rules of a part by its name (see `models.parts`), with its published names in the file that holds it.

    Raises:
        KeyError: a part of a kind that is published nowhere.
    """
    if part.startswith("text_encoder"):
        return TEXT_ENCODER
    if part == "lq_encoder":
        return _LQ_ENCODERS[config.lq_features]
    return _ALIGNMENTS[config.alignment.kind] if part == "alignment" else {"unet": UNET, "vae": VAE}[part]


def published_parts(config: FaithDiffConfig) -> dict[str, list[Rule]]:
    """The parts of the file in which a model's own weights are published: FaithDiff's, or a baseline's network alone.

    Raises:
        InputError: an architecture that no published layout has.
    """
    kind, features = config.alignment.kind, config.lq_features
    if kind not in LAYOUTS:
        *others, last = LAYOUTS
        raise InputError(f"alignment.kind is {kind!r}: the published layouts have {', '.join(others)} and {last} only")
    wanted, parts = LAYOUTS[kind]
    if features != wanted:
        raise InputError(f"lq_features is {features!r}: the published layout has {wanted!r} only")
    return {part: of_part(part, config) for part in parts}


FAITHDIFF: list[Rule] = [
    *(rule.under("denoise_encoder.", "lq_encoder.") for rule in LQ_ENCODER),
    *(rule.under("", "denoiser.alignment.") for rule in ALIGNMENT),
    *(rule.under("", "denoiser.unet.") for rule in UNET),
]
"""`FaithDiff.bin`: LQ encoder, aligner and UNet in one state dict, as in `FaithDiffModel`."""
