"""Groups of parameters: each parameter in one of them or frozen, whatever is wrong said in one line."""

import dataclasses
import pathlib

import numpy as np
import pytest
from training_case import STAGE_1, STAGE_2, model_config, train_config

from faithdiff_jax.config import from_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.training.batch import check_batch, check_memory
from faithdiff_jax.training.config import LossesConfig, load_train_config
from faithdiff_jax.training.groups import assign_groups
from faithdiff_jax.training.parameters import model_shapes, trained_shapes

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
SHAPES = {
    "unet.conv_in.kernel": (3, 3, 4, 16),
    "unet.conv_in.bias": (16,),
    "unet.blocks.attn1.to_q.kernel": (2, 16, 16),
    "alignment.blocks.0.c_fc.kernel": (32, 64),
    "vae.encoder.conv_in.kernel": (3, 3, 3, 8),
}
# Millions of parameters, UNet and aligner as REFERENCE.md has them, and of LoRA's A and B at rank 16.
UNET, ALIGNER, ENCODER, ADAPTERS = 2567.464, 10.609, 34.126, 23.2
STAGE_2_TRAINS = UNET + ALIGNER + ENCODER
# Which of them train; the ablations' other architectures have aligners and encoders of their own.
SHIPPED = {
    "stage1": ALIGNER,
    "stage2": STAGE_2_TRAINS,
    "stage2_published": STAGE_2_TRAINS,
    "frozen_unet": ALIGNER + ENCODER,
    "lora": ALIGNER + ADAPTERS,
    "distill_guidance": ALIGNER + UNET + 0.082,
    "distill_steps": ALIGNER + UNET,
    "ablations/diffusion_fixed": ALIGNER + ENCODER,
    "ablations/encoder_fixed": ALIGNER + UNET,
    "ablations/last_layer_features": UNET + 6.797 + 34.164,
    "ablations/separate_diffusion": ALIGNER + UNET,
    "ablations/separate_encoder": ALIGNER + ENCODER,
    "ablations/without_alignment": UNET + 1.475 + ENCODER,
    "ablations/without_pretraining": STAGE_2_TRAINS,
    "baselines/controlnet": 1250.984,
    "baselines/controlnet_xs": 40.4,
    "baselines/sft": 1333.8,
}


def groups(frozen=("vae.*",), **patterns):
    named = {name: {"parameters": parameters, "learning_rate": 1.0} for name, parameters in patterns.items()}
    return train_config({"groups": named, "frozen": frozen})


def refused(config) -> str:
    with pytest.raises(InputError) as caught:
        assign_groups(config, SHAPES)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_each_parameter_has_its_group():
    config = groups(slow=["unet.conv_in.*"], fast=["alignment.*", "unet.*.to_*.kernel"])
    assert assign_groups(config, SHAPES) == {
        "unet.conv_in.kernel": "slow",
        "unet.conv_in.bias": "slow",
        "unet.blocks.attn1.to_q.kernel": "fast",
        "alignment.blocks.0.c_fc.kernel": "fast",
    }


def test_two_patterns_of_one_group_may_overlap():
    assert set(assign_groups(groups(all=["unet.*", "unet.conv_in.*", "alignment.*"]), SHAPES).values()) == {"all"}


def test_patterns_tell_capitals_apart():
    assert "'UNET.*'" in refused(groups(rest=["UNET.*", "unet.*", "alignment.*"]))


def test_a_pattern_that_matches_nothing():
    assert refused(groups(rest=["unet.*", "aligner.*"])) == (
        "groups.rest: pattern 'aligner.*' matches no parameter, such as unet.conv_in.kernel"
    )
    assert refused(groups(rest=["unet.*"], frozen=["vae.*", "text_encoder*"])) == (
        "frozen: pattern 'text_encoder*' matches no parameter, such as unet.conv_in.kernel"
    )


def test_a_parameter_that_two_claim():
    assert refused(groups(one=["unet.*"], two=["alignment.*", "unet.*.bias"])) == (
        "unet.conv_in.bias: claimed by one and two; a parameter must be in one group, or frozen"
    )
    assert refused(groups(one=["unet.*"], two=["alignment.*", "unet.conv_in.*"])) == (
        "unet.conv_in.kernel: claimed by one and two (and 1 more such); a parameter must be in one group, or frozen"
    )
    assert refused(groups(one=["unet.*", "alignment.*"], frozen=["vae.*", "alignment.*"])) == (
        "alignment.blocks.0.c_fc.kernel: claimed by one and frozen; a parameter must be in one group, or frozen"
    )


def test_a_parameter_that_nobody_speaks_for():
    assert refused(groups(rest=["unet.*"])) == (
        "no group has alignment.blocks.0.c_fc.kernel: add a pattern to a group, or to frozen"
    )
    many = {f"unet.{i}": (1,) for i in range(8)} | {"vae.x": (1,)}
    with pytest.raises(InputError, match=r"^no group has unet\.1, unet\.2, .*unet\.5 and 2 more: add a pattern"):
        assign_groups(groups(rest=["unet.0"]), many)


def test_the_vae_stays_frozen():
    assert refused(groups(rest=["unet.*", "alignment.*"], vae=["vae.*"], frozen=[])) == (
        "group 'vae' has vae.encoder.conv_in.kernel: the VAE stays frozen, add vae.* to frozen"
    )


def test_its_decoder_trains_where_pictures_are_compared():
    shapes = {"unet.x": (1,), "vae.encoder.x": (1,), "vae.decoder.x": (1,), "vae.post_quant_conv.x": (1,)}
    rest = {"parameters": ["unet.*", "vae.decoder.*", "vae.post_quant_conv.*"], "learning_rate": 1e-4}
    config = train_config({"groups": {"rest": rest}, "frozen": ["vae.encoder.*"], "losses": {"pixel": 1}})
    assert assign_groups(config, shapes).keys() == shapes.keys() - {"vae.encoder.x"}
    with pytest.raises(InputError, match=r"has vae\.decoder\.x, vae\.post_quant_conv\.x: the VAE stays frozen"):
        assign_groups(dataclasses.replace(config, losses=LossesConfig()), shapes)
    rest = {"parameters": ["unet.*", "vae.*"], "learning_rate": 1e-4}
    config = train_config({"groups": {"rest": rest}, "losses": {"pixel": 1}})
    with pytest.raises(InputError, match=r"the VAE's encoder stays frozen, add vae\.encoder\.\* and vae\.quant_conv"):
        assign_groups(config, shapes)


def test_no_group_at_all():
    with pytest.raises(InputError, match="groups is empty: at least one group of parameters must train"):
        train_config({"groups": {}, "frozen": ["*"]})
    with pytest.raises(InputError, match="parameters is empty: a group needs at least one pattern"):
        groups(rest=[])


@pytest.mark.parametrize(
    ("changes", "model", "devices", "processes", "message"),
    [
        ({}, {}, 8, 2, None),
        ({"accumulation": 2}, {}, 4, 1, None),
        ({"accumulation": 2}, {"mixing": "batch", "group": 2}, 2, 1, None),
        ({}, {}, 3, 1, "batch is 8: must be a multiple of accumulation 1 x 3 devices, 3"),
        ({"accumulation": 2}, {}, 8, 1, "batch is 8: must be a multiple of accumulation 2 x 8 devices, 16"),
        ({}, {}, 8, 3, "batch is 8: must be a multiple of the processes, 3"),
        (
            {"accumulation": 2},
            {"mixing": "batch", "group": 4},
            2,
            1,
            "batch is 8: must be a multiple of accumulation 2 x 2 devices x alignment.group 4, 16",
        ),
        (
            {},
            {"mixing": "batch"},
            1,
            1,
            "model.alignment.group is null: mixing 'batch' needs the group's size to train, 16 say",
        ),
    ],
)
def test_a_batch_must_divide(changes, model, devices, processes, message):
    config, model = train_config(STAGE_1, **changes), model_config(**model)
    if message is None:
        check_batch(config, model, devices, processes)
        return
    with pytest.raises(InputError) as caught:
        check_batch(config, model, devices, processes)
    assert str(caught.value) == message


def test_a_crop_must_be_whole_latents():
    with pytest.raises(InputError, match=r"data\.crop is 36: must be a multiple of the VAE's 8"):
        check_batch(train_config(STAGE_1, data={"crop": 36}), FaithDiffConfig(), 1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 1_000_000, "data": {"crop": 512}}, r"batch is 1000000 with data.crop 512: 6,291 GB of pictures for"),
        ({"batch": 16, "data": {"crop": 8192}}, "VAE's first activations of 16 pictures take 34 GB of a device's 9 GB"),
    ],
)
def test_a_batch_beyond_all_memory(changes, message, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**24}[name])  # 69 GB
    with pytest.raises(InputError, match=message) as caught:
        check_memory(train_config(STAGE_1, **changes), model_config(), 1, 1)
    assert str(caught.value).endswith("lower batch or data.crop")
    check_memory(train_config(STAGE_1), model_config(), 1, 1)


def test_a_batch_must_divide_over_accumulation():
    with pytest.raises(InputError, match="batch is 8: must be a multiple of accumulation, 3"):
        train_config(STAGE_2, accumulation=3)


def test_every_shipped_config_is_here():
    found = {str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("*.yaml")}
    for folder in ("ablations", "baselines"):
        found |= {str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob(f"{folder}/*.yaml")}
    assert found == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_fits_the_published_model(name):
    config = load_train_config(CONFIGS / f"{name}.yaml")
    model = from_dict(FaithDiffConfig, config.model, name)
    shapes = model_shapes(model)
    labels = assign_groups(config, shapes)
    trained = trained_shapes(config, shapes, labels)
    assert sum(map(np.prod, trained.values())) / 1e6 == pytest.approx(SHIPPED[name], abs=0.05)
    assert set(labels.values()) == set(config.groups) | ({"lora"} if config.lora else set())
    assert not [path for path in labels if path.startswith(("vae.", "text_encoder"))]
    check_batch(config, model, config.batch // config.accumulation, 1)
