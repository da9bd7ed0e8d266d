"""Checkpoints in one file, as the original SDXL code names their tensors: the same model as from diffusers' folders."""

import functools
import re

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.loaders import single_file_utils
from published import write_published

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.models.parts import numbered, part_names
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.single_file import unet_module

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

main = functools.partial(run_command, "convert")


@pytest.fixture(scope="module", params=[False, True], ids=["sdxl", "sd21"])
def models(request, tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("published"), sd21=request.param)


def moved(state, modules):
    """The tensors of modules, by (diffusers' name, the original one, names of what is inside)."""
    found = {}
    for theirs, original, inside in modules:
        for name, tensor in state.items():
            if name.startswith(f"{theirs}."):
                rest = name.removeprefix(f"{theirs}.")
                for module, other in inside.items():
                    if rest.startswith(f"{module}."):
                        rest = other + rest.removeprefix(module)
                found[f"{original}.{rest}"] = tensor
    assert len(found) == len(state)
    return found


def original_unet(unet):
    """The UNet's tensors, numbered through as the original code builds it: block after block, level after level."""
    modules = [
        ("conv_in", "input_blocks.0.0", {}), ("conv_norm_out", "out.0", {}), ("conv_out", "out.2", {}),
        ("time_embedding.linear_1", "time_embed.0", {}), ("time_embedding.linear_2", "time_embed.2", {}),
        ("add_embedding.linear_1", "label_emb.0.0", {}), ("add_embedding.linear_2", "label_emb.0.2", {}),
        ("mid_block.resnets.0", "middle_block.0", RESNET), ("mid_block.attentions.0", "middle_block.1", {}),
        ("mid_block.resnets.1", "middle_block.2", RESNET),
    ]  # fmt: skip
    number = 1
    for i, block in enumerate(unet.down_blocks):
        for r in range(len(block.resnets)):
            modules.append((f"down_blocks.{i}.resnets.{r}", f"input_blocks.{number}.0", RESNET))
            modules.append((f"down_blocks.{i}.attentions.{r}", f"input_blocks.{number}.1", {}))
            number += 1
        modules.append((f"down_blocks.{i}.downsamplers.0", f"input_blocks.{number}.0", {"conv": "op"}))
        number += 1
    number = 0
    for i, block in enumerate(unet.up_blocks):
        attends = hasattr(block, "attentions")
        for r in range(len(block.resnets)):
            modules.append((f"up_blocks.{i}.resnets.{r}", f"output_blocks.{number}.0", RESNET))
            modules.append((f"up_blocks.{i}.attentions.{r}", f"output_blocks.{number}.1", {}))
            number += 1
        modules.append((f"up_blocks.{i}.upsamplers.0", f"output_blocks.{number - 1}.{1 + attends}", {}))
    return moved(unet.state_dict(), modules)


def original_vae(vae):
    """The VAE's tensors: the decoder's levels are counted from the coarse end, attention is of convolutions."""
    resnet = {"conv_shortcut": "nin_shortcut"}
    modules = [("quant_conv", "quant_conv", {}), ("post_quant_conv", "post_quant_conv", {})]
    for side in ("encoder", "decoder"):
        ends = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
        modules += [(f"{side}.{theirs}", f"{side}.{original}", {}) for theirs, original in ends.items()]
        modules += [(f"{side}.mid_block.resnets.{r}", f"{side}.mid.block_{r + 1}", resnet) for r in (0, 1)]
        modules.append((f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", ATTENTION))
        way = {"encoder": "down", "decoder": "up"}[side]
        blocks = getattr(getattr(vae, side), f"{way}_blocks")
        for i, block in enumerate(blocks):
            level = i if way == "down" else len(blocks) - 1 - i
            modules += [
                (f"{side}.{way}_blocks.{i}.resnets.{r}", f"{side}.{way}.{level}.block.{r}", resnet)
                for r in range(len(block.resnets))
            ]
            modules.append((f"{side}.{way}_blocks.{i}.{way}samplers.0", f"{side}.{way}.{level}.{way}sample", {}))
    found = moved(vae.state_dict(), modules)
    return {
        name: tensor[:, :, None, None] if "attn_1" in name and tensor.ndim == 2 else tensor
        for name, tensor in found.items()
    }


OPEN_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
OPEN_CLIP_ENDS = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def open_clip(encoder):
    """A text encoder's tensors as OpenCLIP names them, with what it holds besides."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    found = {theirs: state[ours] for ours, theirs in OPEN_CLIP_ENDS.items()} | {"logit_scale": torch.ones(())}
    layers = encoder.config.num_hidden_layers
    for i in range(layers + ("text_projection.weight" not in state)):  # SD 2.1 does not use the last
        ours, theirs = f"encoder.layers.{i % layers}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            for inner, other in OPEN_CLIP.items():
                found[f"{theirs}.{other}.{kind}"] = state[f"{ours}.{inner}.{kind}"]
            parts = [state[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(parts)
    width = encoder.config.hidden_size
    found["text_projection"] = (
        state["text_projection.weight"].T if "text_projection.weight" in state else torch.eye(width)
    )
    return found


def original_text(encoders):
    """All text encoders of a model, as its original code has them."""
    if len(encoders) == 1:
        return {f"cond_stage_model.model.{name}": tensor for name, tensor in open_clip(encoders[0]).items()}
    first = {
        f"text_model.{name.removeprefix('text_model.')}": value for name, value in encoders[0].state_dict().items()
    }
    first["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    found = {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in first.items()}
    return found | {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in open_clip(encoders[1]).items()}


def write_single(path, unet, vae, encoders=()):
    """One file with everything that such checkpoints hold besides."""
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in original_unet(unet).items()}
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in original_vae(vae).items()}
    tensors |= original_text(encoders) if encoders else {"conditioner.embedders.0.transformer.x": torch.ones(2)}
    tensors |= {"denoiser.sigmas": torch.ones(10)}
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    if path.suffix == ".ckpt":
        torch.save({"state_dict": tensors, "global_step": 110_000}, path)
    else:
        safetensors.torch.save_file(tensors, path)
    return path


def test_diffusers_reads_the_names_of_these_tests_so(models):
    converted = single_file_utils.convert_ldm_vae_checkpoint(
        {f"first_stage_model.{name}": tensor for name, tensor in original_vae(models.vae).items()},
        models.vae.config,
    )
    assert_equal(converted, models.vae.state_dict())
    converted = single_file_utils.convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{name}": tensor for name, tensor in original_unet(models.base_unet).items()},
        models.base_unet.config,
    )
    assert_equal(converted, models.base_unet.state_dict())


def test_diffusers_reads_text_encoders_so(models):
    encoder = models.text_encoders[-1]
    state = {f"here.{name}": tensor for name, tensor in open_clip(encoder).items()}
    converted = single_file_utils.convert_open_clip_checkpoint(encoder, state, prefix="here.")
    wanted = {
        name if name.startswith("text_") else f"text_model.{name}": tensor
        for name, tensor in encoder.state_dict().items()
    }
    # It knows SD 2.1's layer that is not used by its number, and the projection by its full name.
    unused = (f"text_model.encoder.layers.{encoder.config.num_hidden_layers}.", "text_projection")
    more = unused if len(models.text_encoders) == 1 else ()
    assert_equal({name: value for name, value in converted.items() if not name.startswith(more)}, wanted)


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].reshape(tensor.shape), tensor), name


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_the_same_model_as_from_folders(models, tmp_path, suffix):
    flags = ["--sdxl", str(models.sdxl)]
    assert main([*flags, "--vae", str(models.sdxl), "--output", str(tmp_path / "folders")]) == 0
    file = write_single(tmp_path / f"all.{suffix}", models.base_unet, models.base_vae, models.text_encoders)
    flags += ["--unet", str(file), "--vae", str(file), "--text-encoder", str(file), "--output", str(tmp_path / "file")]
    # Only the one file has them.
    hidden = [models.sdxl / name for name in ("unet", "vae", *numbered("text_encoder", len(models.text_encoders)))]
    weights = [path for folder in hidden for path in folder.glob("*.safetensors")]
    for path in weights:
        path.rename(path.with_suffix(".hidden"))
    try:
        assert main(flags) == 0
    finally:
        for path in weights:
            path.with_suffix(".hidden").rename(path)
    folders, single = (ModelDirectory.open(tmp_path / name) for name in ("folders", "file"))
    assert single.config == folders.config
    for part in part_names(single.config):
        ours, theirs = dict(single.arrays(part)), dict(folders.arrays(part))
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            np.testing.assert_array_equal(ours[name], array)


@pytest.mark.parametrize("bare", [True, False], ids=["original names", "diffusers' names"])
def test_a_vae_of_its_own(models, tmp_path, bare):
    state = original_vae(models.vae) if bare else models.vae.state_dict()
    file = tmp_path / "vae.safetensors"
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    flags = ["--sdxl", str(models.sdxl), "--faithdiff", str(models.faithdiff), "--output", str(tmp_path / "model")]
    assert main([*flags, "--vae", str(file)]) == 0
    kernel = dict(ModelDirectory.open(tmp_path / "model").arrays("vae"))["decoder.mid_block.attention.to_q.kernel"]
    np.testing.assert_array_equal(kernel.T, models.vae.decoder.mid_block.attentions[0].to_q.weight.detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.diffusion_model.out.2.bias"), "1 tensor does not fit .*missing conv_out.bias"),
        (
            lambda t: t.update({"model.diffusion_model.extra.weight": torch.ones(1)}),
            "unknown model.diffusion_model.extra",
        ),
        (
            lambda t: t.update({"model.diffusion_model.input_blocks.1.2.x": torch.ones(1)}),
            "unknown model.diffusion_model.input_blocks.1.2.x",
        ),
        (lambda t: t.pop("model.diffusion_model.input_blocks.0.0.weight"), "holds no UNet"),
        (lambda t: t.update({"model.diffusion_model.out.0.bias": torch.ones(3)}), "mis-shaped conv_norm_out.bias"),
    ],
)
def test_files_that_do_not_fit(models, tmp_path, capsys, change, message):
    file = write_single(tmp_path / "all.safetensors", models.base_unet, models.base_vae)
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)
    flags = ["--sdxl", str(models.sdxl), "--unet", str(file), "--output", str(tmp_path / "model")]
    assert main(flags) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text-encoder", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["--text-encoder", "UNET"], "holds no first text encoder, which would be named cond_stage_model.model."),
        (["--unet", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["--unet", "SINGLE", "--faithdiff", "FAITHDIFF"], "FaithDiff's weights hold the UNet, leave one of the two"),
        (["--vae", "UNET"], "holds no VAE"),
    ],
)
def test_bad_input(models, tmp_path, capsys, more, message):
    file = write_single(tmp_path / "all.safetensors", models.base_unet, models.base_vae)
    safetensors.torch.save_file(models.base_unet.state_dict(), tmp_path / "unet.safetensors")
    places = {"SINGLE": str(file), "FAITHDIFF": str(models.faithdiff), "UNET": str(tmp_path / "unet.safetensors")}
    flags = ["--sdxl", str(models.sdxl), "--output", str(tmp_path / "model")]
    assert main([*flags, *(places.get(word, word) for word in more)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_text_encoders_that_do_not_fit(models, tmp_path, capsys):
    """Queries, keys and values that are not three, a layer more, one less."""
    encoder = models.text_encoders[-1]
    prefix = "cond_stage_model.model." if len(models.text_encoders) == 1 else "conditioner.embedders.1.model."
    layers, width = encoder.config.num_hidden_layers, encoder.config.hidden_size
    for change, message in (
        (
            {"transformer.resblocks.0.attn.in_proj_weight": torch.ones(3 * width + 1, width)},
            "must be queries, keys and",
        ),
        ({"transformer.resblocks.0.attn.in_proj_bias": torch.ones(3)}, "mis-shaped text_model.encoder.layers.0.self"),
        (
            {f"transformer.resblocks.{layers + 1}.ln_1.bias": torch.ones(width)},
            f"unknown text_model.encoder.layers.{layers + 1}.",
        ),
        ({"transformer.resblocks.0.ln_3.bias": torch.ones(width)}, "unknown "),
        ({"ln_final.bias": None}, "missing text_model.final_layer_norm.bias"),
    ):
        tensors = original_text(models.text_encoders)
        for name, tensor in change.items():
            tensors.pop(prefix + name, None)
            if tensor is not None:
                tensors[prefix + name] = tensor
        file = tmp_path / "text.safetensors"
        safetensors.torch.save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file)
        flags = ["--sdxl", str(models.sdxl), "--text-encoder", str(file), "--output", str(tmp_path / "model")]
        assert main(flags) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
        assert not (tmp_path / "model").exists()


def test_blocks_of_the_published_size_are_numbered_through():
    """SDXL has two ResNet blocks a level, and the decoder three."""
    assert unet_module("input_blocks.4.1.proj_in.weight", 2) == "down_blocks.1.attentions.0.proj_in.weight"
    assert unet_module("input_blocks.6.0.op.weight", 2) == "down_blocks.1.downsamplers.0.conv.weight"
    assert unet_module("output_blocks.2.2.conv.bias", 2) == "up_blocks.0.upsamplers.0.conv.bias"
    assert unet_module("output_blocks.5.1.norm.bias", 2) == "up_blocks.1.attentions.2.norm.bias"
    assert unet_module("middle_block.1.transformer_blocks.9.attn2.to_k.weight", 2).startswith(
        "mid_block.attentions.0.t"
    )
