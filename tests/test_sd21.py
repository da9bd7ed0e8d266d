"""Stable Diffusion 2.1, both variants: sizes, text, timesteps, gradients, and from the published folder all the way."""

import json

import numpy as np
import published_sd21
import pytest
import safetensors.torch
import torch
from converted import loaded, published_and_converted
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from lora_writer import RANK, kohya_names, kohya_original_names, write
from parity import assert_parity
from pictures import write as write_picture
from published import unet_sd21, write_published
from tiny import write_tokenizer
from torch_aligner import TorchAligner
from torch_pipeline import encode_text
from torch_training import TorchSD21, assert_gradients, to_ours
from training_case import STAGE_2
from training_runs import train, write_photos
from transformers import CLIPTextConfig, CLIPTextModel

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.config import find_config, load
from faithdiff_jax.diffusion import schedule
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.tokenizers import Tokenizers
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import flatten, part_shapes
from faithdiff_jax.weights import published_configs, rules
from faithdiff_jax.weights.keymap import KeyMap
from faithdiff_jax.weights.lora_files import LoRAFile
from faithdiff_jax.weights.model_directory import ModelDirectory

PRESETS = {"epsilon": "models/sd21", "v_prediction": "models/sd21_768"}
PARAMETERS = {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863}

each_variant = pytest.mark.parametrize("prediction", PRESETS)


@each_variant
def test_a_preset_is_what_the_published_folder_says(tmp_path, prediction):
    def written(settings):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        return path

    read = FaithDiffConfig(
        unet=published_configs.unet_config(written(published_sd21.unet(prediction))),
        vae=published_configs.vae_config(written(published_sd21.VAE)),
        text_encoders=(published_configs.text_encoder_config(written(published_sd21.TEXT_ENCODER), output="final"),),
        schedule=published_configs.schedule_config(written(published_sd21.scheduler(prediction))),
    )
    assert load(FaithDiffConfig, find_config(PRESETS[prediction])) == read


def test_every_tensor_of_the_published_size():
    """Names and shapes are those that diffusers and transformers give such folders; nothing is held."""
    config = load(FaithDiffConfig, find_config("models/sd21"))
    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel.from_config(published_sd21.UNET),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**published_sd21.TEXT_ENCODER)),
            "vae": AutoencoderKL.from_config(published_sd21.VAE),
        }
    for part, module in modules.items():
        wanted = {
            name if part != "text_encoder" or name.startswith("text_model.") else f"text_model.{name}": tuple(
                value.shape
            )
            for name, value in module.named_parameters()
        }
        ours = KeyMap(rules.of_part(part, config), part_shapes(config, part)).published_shapes()
        assert ours == wanted
        assert sum(np.prod(shape, dtype=int) for shape in ours.values()) == PARAMETERS[part]


def test_captions_are_padded_with_the_first_token(tmp_path):
    """As its special_tokens_map.json says, not its tokenizer_config.json; a "!" of a caption is then that token."""
    folder = write_tokenizer(tmp_path / "tokenizer", pad_in_map="!")
    (ids,) = Tokenizers.load([folder])(["the cat", "cat!"])
    np.testing.assert_array_equal(ids[0], [516, 515, 513, 517] + [0] * 73)
    np.testing.assert_array_equal(ids[1], [516, 513, 0, 517] + [0] * 73)


@each_variant
def test_text_equals_pytorch(prediction):
    models, folder = published_and_converted(sd21=True, prediction=prediction)
    captions = ["the cat", "", "the cat! sat on the cat " * 30]
    context, _ = encode_text(models, captions)
    assert_parity(loaded(sd21=True, prediction=prediction).encode_text(captions)[0], context.numpy())
    stored = ModelDirectory.open(folder)
    assert (stored.config.schedule.prediction, stored.defaults) == (prediction, {"tile": 8})


@each_variant
@pytest.mark.parametrize("steps", [1, 20, 50])
def test_timesteps_are_those_of_the_published_scheduler(prediction, steps):
    models, _ = published_and_converted(sd21=True, prediction=prediction)
    kind = DDIMScheduler if prediction == "v_prediction" else PNDMScheduler
    theirs = kind.from_pretrained(models.sdxl, subfolder="scheduler")
    theirs.set_timesteps(steps)
    config = loaded(sd21=True, prediction=prediction).config.schedule
    visited = sorted(set(theirs.timesteps.tolist()), reverse=True)  # PNDM goes through one of them twice
    assert visited == schedule.timesteps(config, steps).tolist()
    np.testing.assert_allclose(schedule.alphas_cumprod(config), theirs.alphas_cumprod.numpy(), rtol=1e-5)


def test_trailing_timesteps_are_taken_over(tmp_path):
    """As sd-turbo has them; other words are the sampler's that saved the file."""
    for word, spacing in (("trailing", "trailing"), ("linspace", "leading"), (None, "leading")):
        path = tmp_path / "scheduler_config.json"
        path.write_text(json.dumps(published_sd21.scheduler("epsilon") | {"timestep_spacing": word}))
        assert published_configs.schedule_config(path).spacing == spacing


WITHOUT_EFFECT = {  # see test_parity_training
    "denoise_encoder.down_blocks.0.resnets.0.conv1.bias",
    "denoise_encoder.mid_block.resnets.1.conv2.bias",
    "denoise_encoder.mid_block.attentions.0.to_k.bias",
}


@each_variant
def test_every_gradient(prediction):
    model = TorchSD21(prediction)
    assert_gradients(model, to_ours(model), STAGE_2, WITHOUT_EFFECT)


LORA = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
    "down_blocks.3.resnets.0.conv1": "input_blocks.7.0.in_layers.2",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
}
LORA_TEXT = "text_model.encoder.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("names", [kohya_names, kohya_original_names])
def test_loras_for_it_are_added_and_no_others(tmp_path, monkeypatch, names):
    """kohya's scripts call its only text encoder `lora_te_`."""
    monkeypatch.setattr("lora_writer.UNET", LORA)
    models, folder = published_and_converted(sd21=True)
    stored, torch_unet = ModelDirectory.open(folder), models.unet.state_dict()
    shapes = {("unet", module): torch_unet[f"{module}.weight"].shape for module in LORA}
    shapes["text_encoder", LORA_TEXT] = (16, 16)
    torch.manual_seed(0)
    pairs = {
        place: (torch.randn(RANK, *shape[1:]), torch.randn(shape[0], RANK, *(1 for _ in shape[2:])))
        for place, shape in shapes.items()
    }
    tensors = {name.replace("lora_te1_", "lora_te_"): tensor for name, tensor in names(pairs, 2 * RANK).items()}
    lora = LoRAFile.open(write(tmp_path, tensors), stored.config)
    unet = KeyMap(rules.UNET, part_shapes(stored.config, "unet"))
    params = flatten(loaded(sd21=True).params["unet"])
    for entry in unet.entries:
        (name, *_), ours = entry.published, lora.added("unet", entry.path, params[entry.path])
        before = torch_unet[name]
        if name.removesuffix(".weight") in LORA:
            down, up = pairs["unet", name.removesuffix(".weight")]
            before = before + 2 * torch.einsum("or,r...->o...", up.reshape(-1, RANK), down)
        (found,) = dict(unet.write(entry, np.asarray(ours))).values() if not entry.stacked else (None,)
        if found is not None:
            assert_parity(found, before.numpy(), 1e-6)
    assert set(lora.updates) == {"unet", "text_encoder"}
    with pytest.raises(InputError, match=r"another model|other sizes"):
        LoRAFile.open(tmp_path / "lora.safetensors", ModelDirectory.open(published_and_converted()[1]).config)


def run(command, *arguments):
    assert run_command(command, [str(argument) for argument in arguments]) == 0


@pytest.mark.slow
def test_from_the_published_folder_and_back(tmp_path, rng, capsys):
    """Convert, both stages, export, compile, restore, the UNet back in diffusers: two levels of the model for 768."""
    models = write_published(tmp_path, sd21=True, prediction="v_prediction", levels=2)
    start, trained, photos = tmp_path / "start", tmp_path / "trained", write_photos(tmp_path / "photos")
    run("convert", "--sd21", models.sdxl, "--output", start)
    settings = ["steps=1", "batch=2", "data.crop=32", "dtype=float32", "rematerialisation=none", "optimizer.warmup=0"]
    for stage, model, output in (("stage1", start, tmp_path / "one"), ("stage2", tmp_path / "one", trained)):
        flags = ["--config", stage, "--model", model, "--data", photos, "--output", tmp_path / "runs" / stage]
        assert train([*flags, *settings], devices=1) == 0
        run("convert", "--run", tmp_path / "runs" / stage, "--output", output)
    stored = ModelDirectory.open(trained)
    assert (stored.config.schedule.prediction, stored.defaults["tile"]) == ("v_prediction", 8)

    write_picture(tmp_path / "in" / "a.png", rng.integers(0, 256, (20, 24, 3)).astype(np.uint8))
    flags = ["--model", trained, "--scale", "2", "--steps", "1", "--guidance", "1", "--cache", tmp_path / "kept"]
    run("compile", *flags, "--input", tmp_path / "in")
    run("restore", *flags, "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert (tmp_path / "out" / "a.png").is_file()
    capsys.readouterr()
    run("compile", *flags, "--input", tmp_path / "in")
    assert "0 programs compiled" in capsys.readouterr().out

    run("convert", "--to-torch", trained, "--output", tmp_path / "back.safetensors")
    state = safetensors.torch.load_file(tmp_path / "back.safetensors")
    unet, aligner = unet_sd21(16, levels=2), TorchAligner(32, 16)
    before = models.base_unet.state_dict()
    assert any(not torch.equal(state[name], tensor) for name, tensor in before.items())
    for module in (unet, aligner):
        module.load_state_dict({name: state.pop(name) for name in module.state_dict()}, strict=True)
    kernel = dict(stored.arrays("unet"))["conv_in.kernel"]
    np.testing.assert_array_equal(unet.conv_in.weight.detach().numpy().transpose(2, 3, 1, 0), kernel)
    assert all(name.startswith("denoise_encoder.") for name in state)
