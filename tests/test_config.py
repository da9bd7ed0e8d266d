"""Config files: read, overridden, refused."""

import pathlib

import pytest

from faithdiff_jax.config import from_dict, load, load_yaml, override, to_dict
from faithdiff_jax.data.degradation.config import DegradationConfig
from faithdiff_jax.errors import InputError
from faithdiff_jax.models.config import CLIP_BIGG, FaithDiffConfig

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def test_round_trip():
    assert from_dict(FaithDiffConfig, to_dict(FaithDiffConfig()), "x") == FaithDiffConfig()


@pytest.mark.parametrize("path", sorted((CONFIGS / "models").glob("*.yaml")), ids=lambda p: p.stem)
def test_model_configs_are_read(path):
    load(FaithDiffConfig, path)


def test_the_published_model_is_the_default():
    assert load(FaithDiffConfig, CONFIGS / "models" / "sdxl.yaml") == FaithDiffConfig()


def test_overrides_are_yaml():
    data = override(
        to_dict(FaithDiffConfig()), ["alignment.mixing=batch", "alignment.group=16", "vae.scaling_factor=1"]
    )
    read = from_dict(FaithDiffConfig, data, "x")
    assert (read.alignment.mixing, read.alignment.group, read.vae.scaling_factor) == ("batch", 16, 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unet.width=1", "unknown key unet.width"),
        ("text_encoders=[{size: 1}]", r"unknown key text_encoders\[0\].size"),
        ("unet.channels=wide", "unet.channels is 'wide': must be a list"),
        ("unet.channels=[33, 64, 128]", "channels has 33: must be a multiple of norm_groups, 32"),
        ("unet.channels=[]", "channels is empty"),
        ("unet.heads=[5, 10]", "heads is .5, 10.: needs one number a level, 3"),
        ("unet.heads=[5, 10, 7]", "heads has 7: must divide its level's channels, 1280"),
        ("unet.transformer_depth=[0, -1, 1]", "transformer_depth is"),
        ("unet.resnets_per_level=0", "resnets_per_level is 0: must be at least 1"),
        ("unet.context_dim=1024", "unet.context_dim is 1024: must be the text encoders' sum, 2048"),
        ("unet.pooled_dim=768", "unet.pooled_dim is 768: must be the last encoder's, 1280"),
        ("unet.in_channels=8", "must equal vae.latent_channels, 4"),
        ("unet=3", "unet"),
        ("vae.scaling_factor=0", "vae.scaling_factor is 0"),
        ("vae.channels=[130]", "channels has 130"),
        ("alignment.mixing=time", "mixing is 'time': must be one of none, batch, spatial"),
        ("alignment.group=4", "group is 4: must be at least 1, and goes with mixing 'batch' only"),
        ("alignment.layers=0", "layers is 0: must be at least 1"),
        ("schedule.beta_end=1.5", "beta_start is 0.00085 and beta_end 1.5"),
        ("schedule.train_steps=0", "train_steps is 0: must be at least 1"),
        ("text_encoders=[]", "text_encoders is empty"),
        ("alignment", "override 'alignment': must be key=value"),
        ("alignment.mixing.x=1", "mixing holds a value, not keys"),
        ("alignment.mixing=[", r"override 'alignment.mixing=\[': '\[' is not YAML"),
    ],
)
def test_faults_are_named(text, message):
    with pytest.raises(InputError, match=message) as caught:
        from_dict(FaithDiffConfig, override(to_dict(FaithDiffConfig()), [text]), "model.yaml")
    assert "\n" not in str(caught.value)


def test_what_a_nested_key_leaves_out_is_the_default_of_its_field():
    published = DegradationConfig()
    read = from_dict(DegradationConfig, {"blur2": {"sigma": [0.2, 2.0]}, "noise1": {"gray_probability": 0.1}}, "x")
    assert read.blur2.sigma == (0.2, 2.0)
    assert read.blur2.probability == published.blur2.probability == 0.5
    assert read.noise1.poisson_scale == published.noise1.poisson_scale
    assert read.noise2 == published.noise2


def test_files_that_are_no_configs(tmp_path):
    with pytest.raises(InputError, match=r"none.yaml: no such file"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match=r"list.yaml: holds list, a mapping"):
        load_yaml(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(InputError, match=r"bad.yaml is not YAML") as caught:
        load_yaml(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)


def test_bigg_is_openclips():
    assert (CLIP_BIGG.width, CLIP_BIGG.layers, CLIP_BIGG.projection) == (1280, 32, 1280)
