"""Published config files: SDXL's give the default sizes, and whatever we do not compute is refused by name."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import published_sdxl
from faithdiff_jax.diffusion.schedule import ScheduleConfig
from faithdiff_jax.errors import InputError
from faithdiff_jax.models.clip import TextEncoderConfig
from faithdiff_jax.models.config import CLIP_BIGG, CLIP_L
from faithdiff_jax.models.unet_config import UNetConfig
from faithdiff_jax.models.vae import VAEConfig
from faithdiff_jax.weights import published_configs

SD21_UNET = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "layers_per_block": 2,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "use_linear_projection": True,
}


def read_text(path):
    return published_configs.text_encoder_config(path, output="penultimate")


@pytest.fixture
def write(tmp_path):
    def write_config(data):
        path = tmp_path / "config.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
        return path

    return write_config


@pytest.mark.parametrize(
    ("read", "data", "wanted"),
    [
        (published_configs.unet_config, published_sdxl.UNET, UNetConfig()),
        (published_configs.vae_config, published_sdxl.VAE, VAEConfig()),
        (read_text, published_sdxl.TEXT_ENCODER, CLIP_L),
        (read_text, published_sdxl.TEXT_ENCODER | {"eos_token_id": 49407}, CLIP_L),
        (read_text, published_sdxl.TEXT_ENCODER_2, CLIP_BIGG),
        (published_configs.schedule_config, published_sdxl.SCHEDULER, ScheduleConfig()),
    ],
)
def test_published_sdxl_files_give_the_defaults(write, read, data, wanted):
    assert read(write(data)) == wanted


def test_sd21(write):
    assert published_configs.unet_config(write(SD21_UNET)) == UNetConfig(
        channels=(320, 640, 1280, 1280),
        transformer_depth=(1, 1, 1, 0),
        mid_transformer_depth=1,
        heads=(5, 10, 20, 20),
        context_dim=1024,
        pooled_dim=None,
    )
    h = published_sdxl.TEXT_ENCODER | {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
    }
    h |= {"intermediate_size": 4096, "projection_dim": 512}
    assert published_configs.text_encoder_config(write(h), output="final") == TextEncoderConfig(
        width=1024, layers=23, heads=16, mlp_width=4096, activation="gelu", output="final"
    )


def test_heads_given_by_their_later_name(write):
    data = published_sdxl.UNET | {"attention_head_dim": 64, "num_attention_heads": [5, 10, 20]}
    assert published_configs.unet_config(write(data)).heads == (5, 10, 20)
    assert published_configs.unet_config(write(published_sdxl.UNET | {"attention_head_dim": 8})).heads == (8, 8, 8)


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("use_linear_projection", False, "true"),
        ("class_embed_type", "timestep", "null"),
        ("dual_cross_attention", True, "false"),
        ("addition_embed_type", "image", 'null or "text_time"'),
        ("_class_name", "UNet2DModel", '"UNet2DConditionModel"'),
        ("mid_block_type", "UNetMidBlock2D", '"UNetMidBlock2DCrossAttn"'),
        ("norm_eps", 1e-6, "1e-05"),
        ("layers_per_block", [2, 2, 3], "the same number for every level"),
        ("layers_per_block", "two", "a whole number, or a list of 3"),
        ("transformer_layers_per_block", [1, 2], "a whole number, or a list of 3"),
        ("transformer_layers_per_block", [1, [2], 3], "a whole number, or a list of 3"),
        ("block_out_channels", 320, "a list of whole numbers, one per level"),
        ("block_out_channels", [], "a list of whole numbers, one per level"),
        ("down_block_types", ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"], "3 of DownBlock2D, CrossAttnDownBlock"),
        ("up_block_types", ["UpBlock2D"] * 3, "down_block_types in reverse"),
        ("projection_class_embeddings_input_dim", 1536, "more than six time ids, 1536"),
        ("addition_time_embed_dim", None, "a whole number from 1 to 65,536"),
        ("layers_per_block", 1_000_000_000, "from 1 to 256, as many as these weights can hold"),
        ("layers_per_block", 2.5, "a whole number, or a list of 3"),
        ("layers_per_block", True, "a whole number, or a list of 3"),
        ("transformer_layers_per_block", 1_000_000_000, "from 1 to 256"),
        ("transformer_layers_per_block", [1, 2, 0], "from 1 to 256"),
        ("norm_num_groups", 0, "a whole number from 1 to 65,536"),
        ("in_channels", "x", "a whole number from 1 to 65,536"),
        ("cross_attention_dim", 10**30, "from 1 to 65,536"),
        ("down_block_types", [["DownBlock2D"], {}, 1], "3 of DownBlock2D"),
        ("block_out_channels", [32] * 11, "a list of whole numbers"),
    ],
)
def test_unsupported_unet(write, key, value, supported):
    path = write(published_sdxl.UNET | {key: value})
    with pytest.raises(InputError) as caught:
        published_configs.unet_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert f"{key} is {json.dumps(value)}: supported is {supported}" in message


@pytest.mark.parametrize(
    ("read", "data", "key", "value"),
    [
        (published_configs.vae_config, published_sdxl.VAE, "shift_factor", 0.1159),
        (published_configs.vae_config, published_sdxl.VAE, "use_quant_conv", False),
        (published_configs.vae_config, published_sdxl.VAE, "up_block_types", ["UpDecoderBlock2D"]),
        (published_configs.vae_config, published_sdxl.VAE, "latents_mean", [0.0, 0.0, 0.0, 0.0]),
        (read_text, published_sdxl.TEXT_ENCODER, "architectures", ["T5EncoderModel"]),
        (read_text, published_sdxl.TEXT_ENCODER, "hidden_act", "gelu_new"),
        (published_configs.schedule_config, published_sdxl.SCHEDULER, "prediction_type", "flow_prediction"),
        (published_configs.schedule_config, published_sdxl.SCHEDULER, "beta_schedule", "linear"),
        (published_configs.schedule_config, published_sdxl.SCHEDULER, "rescale_betas_zero_snr", True),
        (published_configs.schedule_config, published_sdxl.SCHEDULER, "num_train_timesteps", 10_000_000_000),
        (published_configs.schedule_config, published_sdxl.SCHEDULER, "steps_offset", "x"),
        (published_configs.schedule_config, published_sdxl.SCHEDULER, "beta_start", [0.1]),
        (published_configs.vae_config, published_sdxl.VAE, "layers_per_block", 1_000_000_000),
        (published_configs.vae_config, published_sdxl.VAE, "norm_num_groups", 0),
        (published_configs.vae_config, published_sdxl.VAE, "scaling_factor", "x"),
        (published_configs.vae_config, published_sdxl.VAE, "scaling_factor", 0),
        (read_text, published_sdxl.TEXT_ENCODER, "vocab_size", "x"),
        (read_text, published_sdxl.TEXT_ENCODER, "num_hidden_layers", 1_000_000_000),
        (read_text, published_sdxl.TEXT_ENCODER, "eos_token_id", [1, 2]),
    ],
)
def test_unsupported_elsewhere(write, read, data, key, value):
    with pytest.raises(InputError) as caught:
        read(write(data | {key: value}))
    assert f"{key} is {json.dumps(value)}: supported is " in str(caught.value)


def test_all_faults_of_a_file_at_once(write):
    data = published_sdxl.UNET | {
        "use_linear_projection": False,
        "class_embed_type": "timestep",
        "layers_per_block": [1, 2, 3],
    }
    with pytest.raises(InputError, match=r"class_embed_type is .*; use_linear_projection is .*; layers_per_block is "):
        published_configs.unet_config(write(data))


@pytest.mark.parametrize(
    ("read", "data", "message"),
    [
        (published_configs.unet_config, published_sdxl.UNET | {"attention_head_dim": 7}, "heads has 7: must divide"),
        (
            published_configs.vae_config,
            published_sdxl.VAE | {"norm_num_groups": 24},
            "must be a multiple of norm_groups, 24",
        ),
        (read_text, published_sdxl.TEXT_ENCODER | {"num_attention_heads": 7}, "must be a multiple of heads"),
        (
            published_configs.schedule_config,
            published_sdxl.SCHEDULER | {"beta_end": 2},
            "beta_end is 2: supported is a number from 0 to 1",
        ),
        (published_configs.schedule_config, "[1, 2]", "holds list"),
        (published_configs.unet_config, "{", "not JSON"),
    ],
)
def test_what_the_configs_refuse_names_the_file(write, read, data, message):
    path = write(data)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"gone\.json: no such file"):
        published_configs.vae_config(tmp_path / "gone.json")


def test_depth_of_the_aligner():
    names = [f"information_transformer_layes.{i}.ln_1.bias" for i in (0, 1, 2, 10)]
    assert published_configs.alignment_config([*names, "conv_in.weight"]).layers == 4


def test_counts_are_bounded_by_the_tensors_there_are(write):
    assert published_configs.unet_config(write(published_sdxl.UNET), tensors=1680).resnets_per_level == 2
    with pytest.raises(
        InputError, match=r"transformer_layers_per_block is \[1, 2, 10\]: supported is from 1 to 9, as many"
    ):
        published_configs.unet_config(write(published_sdxl.UNET), tensors=79)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "1e999", "-Infinity"])
def test_numbers_that_are_not_finite(write, word):
    text = json.dumps(published_sdxl.VAE | {"scaling_factor": 0}).replace(
        '"scaling_factor": 0', f'"scaling_factor": {word}'
    )
    assert word in text
    with pytest.raises(InputError, match="not JSON that can be used"):
        published_configs.vae_config(write(text))


def lq_shapes(channels, resnets) -> dict[str, tuple[int, ...]]:
    return {
        f"denoise_encoder.down_blocks.{level}.resnets.{i}.conv1.weight": (width, 8, 3, 3)
        for level, width in enumerate(channels)
        for i in range(resnets)
    }


def test_sizes_of_the_lq_encoder():
    vae = VAEConfig(channels=(16, 24), resnets_per_level=1, norm_groups=8)
    assert published_configs.lq_encoder_config(lq_shapes((16, 24), 1), vae) == vae.encoder
    found = published_configs.lq_encoder_config(lq_shapes((32, 64, 64), 2), vae)
    assert (found.channels, found.resnets_per_level, found.norm_groups) == ((32, 64, 64), 2, 8)
    odd = VAEConfig(channels=(48, 96), norm_groups=48)
    assert published_configs.lq_encoder_config(lq_shapes((32, 64), 2), odd).norm_groups == 32
    for shapes in ({}, {"denoise_encoder.down_blocks.99.resnets.99.conv1.weight": (1, 1, 1, 1)}, {"other": (3,)}):
        assert published_configs.lq_encoder_config(shapes, vae) == vae.encoder


NONSENSE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
READERS = [
    (published_configs.unet_config, published_sdxl.UNET),
    (published_configs.vae_config, published_sdxl.VAE),
    (read_text, published_sdxl.TEXT_ENCODER_2),
    (published_configs.schedule_config, published_sdxl.SCHEDULER),
]


@settings(max_examples=200)
@given(data=st.data())
def test_nonsense_in_a_config(tmp_path_factory, data):
    """Any value of a published config replaced: a config of ours, or one line that names the file."""
    read, published = data.draw(st.sampled_from(READERS))
    keys = data.draw(st.lists(st.sampled_from(sorted(published)), min_size=1, max_size=3))
    config = published | {key: data.draw(NONSENSE) for key in keys}
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    message = f"{path}: "
    try:
        read(path)
    except InputError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
