"""Config files: read, overridden, refused."""

import dataclasses
import math
import pathlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from faithdiff_jax import config
from faithdiff_jax.config import from_dict, load, load_yaml, override, to_dict
from faithdiff_jax.data.degradation.config import DegradationConfig
from faithdiff_jax.errors import InputError
from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.clip import TextEncoderConfig
from faithdiff_jax.models.config import CLIP_BIGG, FaithDiffConfig
from faithdiff_jax.models.unet_config import UNetConfig
from faithdiff_jax.models.vae import VAEConfig
from faithdiff_jax.training.config import load_train_config

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
MODELS = {"models/sd21", "models/sd21_768", "models/sdxl", "tiny/model", "tiny/ablations_sd21", "tiny/ablations_sdxl"}
NO_STAGES = {*MODELS, "tiny/autoencoder"}


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
        ("unet.heads=[5, 10]", "heads is .5, 10.: needs one number per level, 3"),
        ("unet.heads=[5, 10, 7]", "heads has 7: must divide its level's channels, 1280"),
        ("unet.transformer_depth=[0, -1, 1]", "transformer_depth is"),
        ("unet.resnets_per_level=0", "resnets_per_level is 0: must be a whole number from 1 to 256"),
        ("unet.context_dim=1024", "unet.context_dim is 1024: must be the text encoders' sum, 2048"),
        ("unet.pooled_dim=768", "unet.pooled_dim is 768: must be the last encoder's, 1280"),
        ("unet.in_channels=8", "must equal vae.latent_channels, 4"),
        ("unet=3", "unet"),
        ("vae.scaling_factor=0", "vae.scaling_factor is 0"),
        ("vae.channels=[130]", "channels has 130"),
        ("alignment.mixing=time", "mixing is 'time': must be one of none, batch, spatial"),
        ("alignment.group=4", "group is 4: must be at least 1, and goes with mixing 'batch' only"),
        ("alignment.layers=0", "layers is 0: must be a whole number from 1 to 256"),
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


def test_configs_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.find_config("stage2").read_text() == (CONFIGS / "stage2.yaml").read_text()
    assert config.find_config("tiny/stage2") == config.CONFIGS / "tiny" / "stage2.yaml"
    (tmp_path / "stage2").mkdir()
    assert config.find_config("stage2") == config.CONFIGS / "stage2.yaml"
    (tmp_path / "stage2.yaml").write_text("steps: 1")
    assert config.find_config("stage2.yaml") == pathlib.Path("stage2.yaml")
    for name in ("stage9", "", "../configs/stage2", "x" * 5000, "/stage2"):
        with pytest.raises(InputError, match="no such file, nor the name of a configuration") as caught:
            config.find_config(name)
        assert "the names are ablations/diffusion_fixed, " in str(caught.value)
    with pytest.raises(InputError, match="did you mean ablations/encoder_fixed"):
        config.find_config("encoder_fixd")


@pytest.mark.parametrize(
    "name", [name for name in config.config_names() if name not in NO_STAGES and "evaluation/" not in name]
)
def test_every_stage_is_read_by_its_name(name):
    load_train_config(name)


def test_a_file_extends_one_that_comes_with_the_package(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: ablations/encoder_fixed\nsteps: 700\n")
    (tmp_path / "more.yaml").write_text("extends: mine.yaml\nbatch: 512\n")
    read = load_train_config(tmp_path / "more.yaml")
    assert (read.steps, read.batch, sorted(read.groups)) == (700, 512, ["rest"])


NONSENSE = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 10**9, 10**30, math.nan, math.inf, -math.inf, 0.5, 2.0, "", "4", (), (0,), {}, b"2"]),
    st.integers(max_value=0),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-1, 3), max_size=3).map(tuple),
)
SIZES = [
    (cls, field.name)
    for cls in (UNetConfig, VAEConfig, AlignmentConfig, TextEncoderConfig)
    for field in dataclasses.fields(cls)
    if isinstance(field.default, int) or field.name in ("channels", "heads", "transformer_depth")
]


@pytest.mark.parametrize(("cls", "name"), SIZES, ids=lambda x: getattr(x, "__name__", x))
@settings(max_examples=60)
@given(value=NONSENSE)
@example(value=0)
@example(value=10**9)
@example(value=True)
@example(value=())
def test_sizes_refuse_nonsense_by_name(cls, name, value):
    """At once and whatever the type: nothing is counted, divided by or built first."""
    whole = type(value) is int
    depths = isinstance(value, tuple) and len(value) == 3 and all(item in range(257) for item in value)
    heads = depths and set(value) <= {1, 2}
    right = {
        "end_token": whole and value == 0,
        "transformer_depth": depths,
        "heads": heads,
        "pooled_dim": value is None,
    }
    if right.get(name):
        return
    with pytest.raises(ValueError, match=name) as caught:
        cls(**{name: value})
    assert "\n" not in str(caught.value)
