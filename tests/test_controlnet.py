"""ControlNet against diffusers': its residuals, the UNet with them, conversion both ways, restoring."""

import functools
import json
import pathlib
import tempfile

import jax
import numpy as np
import pytest
import skimage.data
import torch
from converted import convert_files, published_and_converted
from parity import assert_parity, nchw, nhwc, relative_error
from port import normal
from torch_baselines import HINT_CHANNELS, controlled, controlnet

from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.models.parts import Networks, part_shapes
from faithdiff_jax.weights.initialisation import ENCODER_COPY, fresh_part
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.tensor_files import open_tensors
from faithdiff_jax.weights.to_torch import to_torch


@functools.cache
def converted(*, sd21: bool = False) -> tuple[torch.nn.Module, pathlib.Path, FaithDiff]:
    """diffusers' ControlNet, the folder that it wrote itself into, and the model that the converter made with it."""
    models, _ = published_and_converted(sd21=sd21)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faithdiff-test-"))
    control = controlnet(models.base_unet)
    control.save_pretrained(folder / "controlnet")
    convert_files(folder / "model", sdxl=models.sdxl, vae=models.vae_folder, controlnet=folder / "controlnet")
    return control, folder, FaithDiff.load(folder / "model")


def denoising_inputs(rng, model: FaithDiff, height: int, width: int) -> list[np.ndarray | None]:
    """Latents, timesteps, LQ pictures, context, pooled, time ids."""
    inputs = [normal(rng, 2, height, width, 4), np.array([901, 3])]
    inputs += [rng.uniform(-1, 1, (2, 8 * height, 8 * width, 3)).astype(np.float32)]
    inputs += [normal(rng, 2, 7, model.config.unet.context_dim)]
    if model.config.unet.pooled_dim is None:
        return [*inputs, None, None]
    return [*inputs, normal(rng, 2, 20), rng.uniform(0, 999, (2, 6)).astype(np.float32)]


@pytest.mark.parametrize("sd21", [False, True])
def test_the_whole_model_predicts_as_pytorchs(rng, sd21):
    control, _, model = converted(sd21=sd21)
    latents, timesteps, pictures, context, pooled, time_ids = denoising_inputs(rng, model, 7, 9)
    added = (
        None if pooled is None else {"text_embeds": torch.from_numpy(pooled), "time_ids": torch.from_numpy(time_ids)}
    )
    unet = published_and_converted(sd21=sd21)[0].base_unet
    given = nchw(latents), torch.from_numpy(timesteps), torch.from_numpy(context), added
    expected = controlled(unet, control, *given, nchw((pictures + 1) / 2))
    features = model.encode_lq(pictures)
    assert features.shape == (2, 7, 9, 16)
    with torch.no_grad():
        assert_parity(features, nhwc(control.controlnet_cond_embedding(nchw((pictures + 1) / 2))))
        plain = unet(*given[:3], added_cond_kwargs=added).sample
    assert_parity(model.predict_noise(latents, timesteps, features, context, pooled, time_ids), nhwc(expected))
    assert relative_error(nhwc(plain), nhwc(expected)) > 0.1


def test_each_residual(rng):
    control, _, model = converted()
    latents, timesteps, pictures, context, pooled, time_ids = denoising_inputs(rng, model, 5, 6)
    added = {"text_embeds": torch.from_numpy(pooled), "time_ids": torch.from_numpy(time_ids)}
    with torch.no_grad():
        given = nchw(latents), torch.from_numpy(timesteps), torch.from_numpy(context), nchw((pictures + 1) / 2)
        residuals, middle = control(*given, added_cond_kwargs=added, return_dict=False)
    features = model.encode_lq(pictures)
    networks = Networks(model.config, np.float32)

    @jax.jit
    def residuals_of(params, latents, timesteps, features, context, pooled, time_ids):
        denoiser = networks.denoiser(params)
        embedding = denoiser.embed_timesteps(timesteps) + denoiser.embed_added(pooled, time_ids)
        return denoiser.alignment.residuals(latents, features, embedding, denoiser.alignment.project_text(context))

    ours = residuals_of(model.denoiser_params, latents, timesteps, features, context, pooled, time_ids)
    assert len(ours) == len(residuals) + 1
    for found, expected in zip(ours, [*residuals, middle], strict=True):
        assert_parity(found, nhwc(expected))


@pytest.mark.parametrize("sd21", [False, True])
def test_back_to_diffusers(tmp_path, sd21):
    control, folder, model = converted(sd21=sd21)
    to_torch(folder / "model", tmp_path / "back.safetensors")
    back = open_tensors(tmp_path / "back.safetensors")
    wanted = control.state_dict()
    assert back.shapes().keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(back.get(name), tensor.numpy())
    assert model.config.lq_encoder_config.channels == HINT_CHANNELS


def test_a_file_alone_and_what_is_refused(tmp_path):
    models, _ = published_and_converted()
    _, folder, _ = converted()
    weights = folder / "controlnet" / "diffusion_pytorch_model.safetensors"
    alone = tmp_path / "control.safetensors"
    alone.write_bytes(weights.read_bytes())
    published = {"sdxl": models.sdxl, "vae": models.vae_folder}
    convert_files(tmp_path / "model", **published, controlnet=alone)
    same = ModelDirectory.open(folder / "model")
    assert ModelDirectory.open(tmp_path / "model").config == same.config
    (tmp_path / "config.json").write_text(
        json.dumps({"controlnet_conditioning_channel_order": "bgr"}), encoding="utf-8"
    )
    with pytest.raises(InputError, match=r'controlnet_conditioning_channel_order is "bgr": supported is "rgb"$'):
        convert_files(tmp_path / "other", **published, controlnet=alone)
    with pytest.raises(InputError, match="a ControlNet steers SDXL's UNet, not FaithDiff's: leave one out"):
        convert_files(tmp_path / "other", **published, controlnet=alone, faithdiff=models.faithdiff)
    other = tmp_path / "unet" / "unet.safetensors"
    other.parent.mkdir()
    other.write_bytes((models.sdxl / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"do not fit this architecture: .*missing controlnet_mid_block.weight"):
        convert_files(tmp_path / "other", **published, controlnet=other)
    assert not (tmp_path / "other").exists()


def test_it_restores_in_tiles_with_guidance_and_a_new_one_changes_nothing(rng):
    _, _, model = converted()
    image = skimage.data.astronaut()[60:83, 180:209]
    options = {"scale": 2, "steps": 2, "tile": 4, "seed": 1}
    restored = model.restore(image, "the cat", **options)
    assert restored.shape == (46, 58, 3)
    with pytest.raises(InputError, match=r"must be 1 for a model of alignment.kind 'controlnet'"):
        model.restore(image, "the cat", **options, deepcache_interval=2)
    stored = ModelDirectory.open(published_and_converted()[1])
    fresh = fresh_part(model.config, "alignment", lambda part: dict(stored.arrays(part)), seed=0)
    assert {path: array.shape for path, array in fresh.items()} == part_shapes(model.config, "alignment")
    unet = dict(stored.arrays("unet"))
    for path, array in fresh.items():
        if path.startswith(ENCODER_COPY):
            np.testing.assert_array_equal(array, unet[path.removeprefix(ENCODER_COPY)])
        else:
            assert not array.any()
