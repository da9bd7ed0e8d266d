"""Published config files: SDXL's give the default sizes, and whatever we do not compute is refused by name."""

import json

import pytest

from benchmarks import published_sdxl
from faithdiff_jax.diffusion.schedule import ScheduleConfig
from faithdiff_jax.errors import InputError
from faithdiff_jax.models.clip import TextEncoderConfig
from faithdiff_jax.models.config import CLIP_BIGG, CLIP_L
from faithdiff_jax.models.unet import UNetConfig
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
        ("block_out_channels", 320, "a list of whole numbers"),
        ("block_out_channels", [], "a list of whole numbers"),
        ("down_block_types", ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"], "3 of DownBlock2D, CrossAttnDownBlock"),
        ("up_block_types", ["UpBlock2D"] * 3, "down_block_types in reverse"),
        ("projection_class_embeddings_input_dim", 1536, "more than six time ids, 1536"),
        ("addition_time_embed_dim", None, "a whole number"),
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
        (published_configs.schedule_config, published_sdxl.SCHEDULER | {"beta_end": 2}, "beta_end 2"),
        (published_configs.schedule_config, "[1, 2]", "holds list"),
        (published_configs.unet_config, "{", "is not JSON"),
    ],
)
def test_what_the_configs_refuse_names_the_file(write, read, data, message):
    path = write(data)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"gone\.json: cannot be read"):
        published_configs.vae_config(tmp_path / "gone.json")


def test_depth_of_the_aligner():
    names = [f"information_transformer_layes.{i}.ln_1.bias" for i in (0, 1, 2, 10)]
    assert published_configs.alignment_config([*names, "conv_in.weight"]).layers == 4
