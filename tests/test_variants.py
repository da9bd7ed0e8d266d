"""The architectures of the paper's ablations: without the aligner, and with the encoder's last layer as features."""

import functools
import pathlib
import tempfile

import numpy as np
import pytest
import skimage.data
import torch
import yaml
from converted import convert_files, published_and_converted
from parity import assert_parity, nchw, nhwc, relative_error
from port import normal
from published import randomise
from torch import nn
from torch_aligner import TorchAligner

from faithdiff_jax.config import from_dict, load, to_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.images import to_float, to_uint8, upscale
from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import flatten, part_names, part_shapes, unflatten
from faithdiff_jax.weights import rules
from faithdiff_jax.weights.initialisation import fresh_part
from faithdiff_jax.weights.keymap import KeyMap
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.stored_files import Contents
from faithdiff_jax.weights.to_torch import to_torch

VARIANTS = {
    "add": {"alignment": {"kind": "add"}},
    "last": {"alignment": {"norm_groups": 4}, "lq_features": "last"},
    "add, last": {"alignment": {"kind": "add"}, "lq_features": "last"},
    "difference": {"decoder_output": "difference"},
}


@functools.cache
def variant(name: str) -> tuple[FaithDiffConfig, pathlib.Path]:
    """A model directory of a variant: the tiny published model's parts, with aligner and LQ encoder made anew."""
    _, published = published_and_converted()
    config = load(FaithDiffConfig, write_overrides(published, VARIANTS[name]))
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faithdiff-test-")) / "model"
    model = ModelDirectory.open(published)
    parts = {part: model.contents(part) for part in part_names(config)}
    for part in ("alignment", "lq_encoder"):
        parts[part] = Contents.of(fresh_part(config, part, stored_arrays, seed=0))
    ModelDirectory.write(folder, config, parts, tokenizers=published, provenance={})
    return config, folder


def write_overrides(published: pathlib.Path, changes: dict) -> pathlib.Path:
    """A YAML file of the published model's architecture with some keys changed."""
    data = to_dict(ModelDirectory.open(published).config)
    for key, value in changes.items():
        data[key] = data[key] | value if isinstance(value, dict) else value
    path = pathlib.Path(tempfile.mkdtemp(prefix="faithdiff-test-")) / "model.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


@functools.cache
def stored_arrays(part: str) -> dict[str, np.ndarray]:
    _, published = published_and_converted()
    return dict(ModelDirectory.open(published).arrays(part))


@functools.cache
def loaded_variant(name: str) -> FaithDiff:
    return FaithDiff.load(variant(name)[1])


def with_alignment(model: FaithDiff, arrays: dict[str, np.ndarray]) -> FaithDiff:
    """The same model with other parameters in its aligner."""
    return FaithDiff(model.config, model.params | {"alignment": unflatten(arrays)}, None)


def denoiser_inputs(rng, model: FaithDiff, height: int, width: int) -> list[np.ndarray]:
    channels = 8 if model.config.lq_features == "last" else 32
    latents, features = normal(rng, 2, height, width, 4), normal(rng, 2, height, width, channels)
    time_ids = np.array([[80, 104, 0, 0, 80, 104]] * 2, np.float32)
    return [latents, np.array([901.0, 3.0], np.float32), features, normal(rng, 2, 7, 40), normal(rng, 2, 20), time_ids]


def torch_noise(inputs: list[np.ndarray], join) -> np.ndarray:
    """The published UNet on these inputs, `join(hidden, features)` in place of its first convolution's result."""
    unet = published_and_converted()[0].unet
    latents, timesteps, features, context, pooled, time_ids = map(torch.from_numpy, inputs)
    hook = unet.conv_in.register_forward_hook(lambda module, args, hidden: join(hidden, nchw(features)))
    try:
        added = {"text_embeds": pooled, "time_ids": time_ids}
        with torch.no_grad():
            return nhwc(unet(nchw(latents), timesteps, context, added_cond_kwargs=added).sample)
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["add", "last"])
def test_a_variant_restores(name):
    image = skimage.data.astronaut()[60:83, 180:209]
    restored = loaded_variant(name).restore(image, "the cat", scale=2, steps=2)
    assert restored.shape == (46, 58, 3)
    assert restored.std() > 1


@pytest.mark.parametrize("name", VARIANTS)
def test_a_fresh_variant_is_loaded_and_begins_as_the_plain_unet(rng, name):
    model = loaded_variant(name)
    assert model.config == variant(name)[0]
    inputs = denoiser_inputs(rng, model, 5, 7)
    assert_parity(model.predict_noise(*inputs), torch_noise(inputs, lambda hidden, features: hidden))


@pytest.mark.parametrize("name", ["add", "add, last"])
def test_addition_is_one_convolution_of_the_features_added(rng, name):
    model = loaded_variant(name)
    inputs = denoiser_inputs(rng, model, 5, 7)
    kernel, bias = normal(rng, 3, 3, inputs[2].shape[-1], 16), normal(rng, 16)
    weight = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
    convolve = functools.partial(nn.functional.conv2d, weight=weight, bias=torch.from_numpy(bias), padding=1)
    expected = torch_noise(inputs, lambda hidden, features: hidden + convolve(features))
    trained = with_alignment(model, {"conv.kernel": kernel, "conv.bias": bias})
    assert_parity(trained.predict_noise(*inputs), expected)
    assert relative_error(model.predict_noise(*inputs), expected) > 0.01


@pytest.mark.parametrize("name", ["last", "add, last"])
def test_last_features_are_the_whole_vae_encoders(rng, name):
    models, _ = published_and_converted()
    images = rng.uniform(-1, 1, (1, 40, 56, 3)).astype(np.float32)
    features = loaded_variant(name).encode_lq(images)
    assert features.shape == (1, 5, 7, 8)
    with torch.no_grad():
        assert_parity(features, nhwc(models.vae.encoder(nchw(images))))


def test_the_aligner_works_on_last_features(rng):
    torch.manual_seed(0)
    aligner = TorchAligner(8, 16, groups=4)
    randomise(aligner)
    model = loaded_variant("last")
    keymap = KeyMap(rules.ALIGNMENT, part_shapes(model.config, "alignment"))
    state = {name: tensor.numpy() for name, tensor in aligner.state_dict().items()}
    model = with_alignment(model, dict(keymap.read(state.__getitem__)))
    inputs = [array[:1] for array in denoiser_inputs(rng, model, 5, 7)]  # torch's would mix the batch
    expected = torch_noise(inputs, aligner)
    assert_parity(model.predict_noise(*inputs), expected)
    inputs[2] = -inputs[2]
    assert relative_error(model.predict_noise(*inputs), expected) > 1e-3


def test_a_difference_is_added_to_the_enlarged_input(monkeypatch):
    model = loaded_variant("difference")
    image = skimage.data.astronaut()[60:83, 180:209]
    enlarged = upscale(image, 2)
    decoded = np.linspace(-0.5, 0.5, 48 * 64 * 3, dtype=np.float32).reshape(1, 48, 64, 3)
    monkeypatch.setattr(model, "decode", lambda latents, vae_tile: decoded)
    restored = model.restore(image, "the cat", scale=2, steps=1, color_fix="none", multiple=16)
    np.testing.assert_array_equal(restored, to_uint8(to_float(enlarged) + decoded[0, :46, :58]))


def test_published_sizes():
    add = FaithDiffConfig(alignment=AlignmentConfig(kind="add"))
    assert part_shapes(add, "alignment") == {"conv.kernel": (3, 3, 512, 320), "conv.bias": (320,)}
    last = FaithDiffConfig(alignment=AlignmentConfig(norm_groups=8), lq_features="last")
    shapes = part_shapes(last, "lq_encoder")
    assert set(shapes) - set(part_shapes(add, "lq_encoder")) == {
        *("conv_norm_out.scale", "conv_norm_out.bias", "conv_out.kernel", "conv_out.bias"),
    }
    assert shapes["conv_out.kernel"] == (3, 3, 512, 8)
    aligner = part_shapes(last, "alignment")
    assert aligner["condition_embedding.conv_in.kernel"] == (3, 3, 8, 8)
    assert aligner["condition_embedding.conv_out.kernel"] == (3, 3, 8, 320)
    default = part_shapes(FaithDiffConfig(), "alignment")
    assert {path: shape for path, shape in default.items() if not path.startswith("condition")} == {
        path: shape for path, shape in aligner.items() if not path.startswith("condition")
    }


def test_bad_choices():
    with pytest.raises(InputError, match=r"^here: alignment.kind is 'sum': must be one of transformer, add, "):
        from_dict(FaithDiffConfig, {"alignment": {"kind": "sum"}}, "here")
    with pytest.raises(InputError, match=r"^here: lq_features is 'first': must be one of penultimate, last, hint$"):
        from_dict(FaithDiffConfig, {"lq_features": "first"}, "here")
    with pytest.raises(InputError, match=r"^here: decoder_output is 'noise': must be one of picture, difference$"):
        from_dict(FaithDiffConfig, {"decoder_output": "noise"}, "here")
    with pytest.raises(InputError, match="alignment: norm_groups is 32: must divide the features' 8"):
        part_shapes(FaithDiffConfig(lq_features="last"), "alignment")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("add", "alignment.kind is 'add': the published layouts have transformer, controlnet and controlnet_xs only"),
        ("last", "lq_features is 'last': the published layout has 'penultimate' only"),
    ],
)
def test_the_published_layout_has_neither(tmp_path, name, message):
    _, folder = variant(name)
    with pytest.raises(InputError) as caught:
        to_torch(folder, tmp_path / "back.safetensors")
    assert str(caught.value) == f"{folder}: {message}"
    assert list(tmp_path.iterdir()) == []


def test_fresh_parts_are_the_converters(tmp_path):
    """Without FaithDiff's own weights the converter makes the same two parts, through the published names."""
    models, _ = published_and_converted()
    convert_files(tmp_path / "model", sdxl=models.sdxl, vae=models.vae_folder, seed=3)
    config = ModelDirectory.open(tmp_path / "model").config
    for part in ("alignment", "lq_encoder"):
        stored = flatten(ModelDirectory.open(tmp_path / "model").load(part))
        fresh = fresh_part(config, part, stored_arrays, seed=3)
        assert fresh.keys() == stored.keys()
        for path, array in fresh.items():
            assert isinstance(array, np.ndarray)
            assert array.dtype == stored[path].dtype
            np.testing.assert_array_equal(array, stored[path])
    other = fresh_part(config, "alignment", stored_arrays, seed=4)
    assert not np.array_equal(
        other["blocks.0.c_fc.kernel"], fresh_part(config, "alignment", stored_arrays, 3)["blocks.0.c_fc.kernel"]
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_fresh_parts_of_variants(name):
    config, _ = variant(name)
    for part in ("alignment", "lq_encoder"):
        fresh = fresh_part(config, part, stored_arrays, seed=0)
        assert {path: array.shape for path, array in fresh.items()} == part_shapes(config, part)
    if config.alignment.kind == "add":
        assert all(not array.any() for array in fresh_part(config, "alignment", stored_arrays, seed=0).values())


def test_other_parts_are_never_fresh():
    config, _ = variant("add")
    for part in ("unet", "vae", "decoder"):
        with pytest.raises(ValueError, match=f"part is '{part}': must be alignment or lq_encoder"):
            fresh_part(config, part, stored_arrays, seed=0)
