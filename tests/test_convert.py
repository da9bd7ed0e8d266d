"""Conversion of a published-layout tree and back: bit-exact, or refused with every fault named and nothing left."""

import functools
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from converted import convert_files
from parity import assert_parity, nchw, nhwc
from published import VAE_CHANNELS, PublishedModels, randomise, write_published
from published import vae as published_vae

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.models.parts import numbered, part_shapes
from faithdiff_jax.weights import rules
from faithdiff_jax.weights.initialisation import fresh_part
from faithdiff_jax.weights.keymap import KeyMap
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.to_torch import to_torch

main = functools.partial(run_command, "convert")


def flags(models: PublishedModels) -> dict[str, str]:
    """What `convert` takes for the published tree."""
    return {"sdxl": str(models.sdxl), "vae": str(models.vae_folder), "faithdiff": str(models.faithdiff)}


def published_part(model_dir, part: str, part_rules) -> dict[str, np.ndarray]:
    """A part of a model directory under its published names."""
    keymap = KeyMap(part_rules, part_shapes(ModelDirectory.open(model_dir).config, part))
    arrays = dict(ModelDirectory.open(model_dir).arrays(part, [entry.path for entry in keymap.entries]))
    return {name: array for entry in keymap.entries for name, array in keymap.write(entry, arrays[entry.path])}


def assert_same(arrays: dict, state: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert arrays.keys() == state.keys()
    for name, tensor in state.items():
        array = arrays[name]
        if isinstance(array, np.ndarray):
            kind, array = array.dtype.name, torch.from_numpy(np.array(array).reshape(-1).view(np.uint8))
            assert kind == str(tensor.dtype).removeprefix("torch.")
            assert torch.equal(array, tensor.contiguous().reshape(-1).view(torch.uint8)), name
        else:
            assert array.dtype == tensor.dtype
            assert torch.equal(array, tensor), name


def text_state(encoder) -> dict[str, torch.Tensor]:
    """A text encoder's tensors under the published names, which transformers 5 does not always give them."""
    return {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor
        for name, tensor in encoder.state_dict().items()
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> PublishedModels:
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def converted(models, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "model"
    convert_files(**flags(models), output=output)
    return output


@pytest.fixture
def tree(models, tmp_path):
    """A copy of the published tree to damage, as the arguments of `convert`."""
    shutil.copytree(models.sdxl.parent, tmp_path / "tree")
    paths = {name: tmp_path / "tree" / path.name for name, path in zip(flags(models), tree_paths(models), strict=True)}
    return paths | {"output": tmp_path / "model"}


def tree_paths(models):
    return models.sdxl, models.vae_folder, models.faithdiff


def assert_refused(paths: dict, message: str) -> str:
    """Conversion fails with the message and leaves nothing."""
    output = paths["output"]
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(InputError, match=message) as caught:
        convert_files(**paths)
    assert sorted(output.parent.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


LOADERS = {"safetensors": safetensors.torch.load_file, "bin": torch.load}


@pytest.mark.parametrize(
    ("suffix", "case"),
    [
        ("safetensors", {}),
        ("bin", {"dtype": torch.float16, "variant": "fp16", "shard": "100KB"}),
        ("safetensors", {"dtype": torch.bfloat16, "shard": "100KB"}),
        ("bin", {"dtype": torch.bfloat16, "safe": False}),
        ("safetensors", {"safe": False, "shard": "100KB"}),
        ("bin", {"sd21": True}),
    ],
)
def test_there_and_back(tmp_path, suffix, case):
    models = write_published(tmp_path, seed=3, **case)
    model_dir = tmp_path / "model"
    convert_files(**flags(models), output=model_dir)
    to_torch(model_dir, tmp_path / f"back.{suffix}")
    assert_same(LOADERS[suffix](tmp_path / f"back.{suffix}"), models.faithdiff_state())
    assert_same(published_part(model_dir, "vae", rules.VAE), models.vae.state_dict())
    names = numbered("text_encoder", len(models.text_encoders))
    for name, encoder in zip(names, models.text_encoders, strict=True):
        assert_same(published_part(model_dir, name, rules.TEXT_ENCODER), text_state(encoder))
    assert [path.name for path in sorted(tmp_path.iterdir()) if path.name.startswith(".")] == []


def test_mixed_dtypes_there_and_back(models, tree):
    state = models.faithdiff_state()
    state = {name: tensor.half() if "norm" not in name else tensor for name, tensor in state.items()}
    tree["faithdiff"] = tree["faithdiff"].with_suffix(".safetensors")
    safetensors.torch.save_file(state, tree["faithdiff"])
    convert_files(**tree)
    back = tree["output"].with_suffix(".safetensors")
    to_torch(tree["output"], back)
    assert_same(safetensors.torch.load_file(back), state)


def test_architecture_and_provenance(models, converted):
    config = ModelDirectory.open(converted).config
    assert config.unet.channels == (16, 16, 32)
    assert config.unet.transformer_depth == (0, 2, 3)
    assert config.unet.heads == (1, 2, 4)
    assert (config.unet.context_dim, config.unet.pooled_dim, config.unet.time_id_dim) == (40, 20, 8)
    assert config.vae.channels == VAE_CHANNELS
    assert config.vae.scaling_factor == 0.13025
    assert [encoder.output for encoder in config.text_encoders] == ["penultimate"] * 2
    assert [encoder.end_token for encoder in config.text_encoders] == [517, 517]
    assert (config.alignment.layers, config.alignment.heads, config.alignment.mixing) == (2, 8, "none")
    assert config.schedule.steps_offset == 1
    provenance = yaml.safe_load((converted / "config.yaml").read_text(encoding="utf-8"))["provenance"]
    assert provenance["sources"] == flags(models)
    assert provenance["parts"]["unet"] == {
        "origin": str(models.faithdiff),
        "dtype": "float32",
        "files": [{"name": "FaithDiff.bin", "bytes": models.faithdiff.stat().st_size}],
    }
    for name in ("tokenizer", "tokenizer_2"):
        for file in (models.sdxl / name).iterdir():
            assert (converted / name / file.name).read_bytes() == file.read_bytes()


def test_sd21_takes_the_final_states(tmp_path):
    models = write_published(tmp_path, sd21=True)
    convert_files(sdxl=str(models.sdxl), output=tmp_path / "model")
    config = ModelDirectory.open(tmp_path / "model").config
    assert [encoder.output for encoder in config.text_encoders] == ["final"]
    assert (config.unet.pooled_dim, config.unet.transformer_depth) == (None, (1, 1, 1, 0))


def test_without_faithdiff_a_model_ready_for_training(models, tmp_path):
    convert_files(sdxl=str(models.sdxl), output=tmp_path / "model", seed=5)
    to_torch(tmp_path / "model", tmp_path / "start.safetensors")
    state = safetensors.torch.load_file(tmp_path / "start.safetensors")
    wanted = models.faithdiff_state()
    assert state.keys() == wanted.keys()
    assert all(tensor.shape == wanted[name].shape for name, tensor in state.items())

    for name, tensor in models.base_unet.state_dict().items():
        assert torch.equal(state[name], tensor)
    encoder = models.base_vae.encoder.state_dict()
    for name, tensor in models.lq_encoder.state_dict().items():
        assert state[f"denoise_encoder.{name}"].shape == tensor.shape
        assert torch.equal(state[f"denoise_encoder.{name}"], encoder[name])

    for name, tensor in models.aligner.state_dict().items():
        found = state[name]
        if name.startswith(("condition_embedding.conv_out", "spatial_ch_projs")) or name.endswith(
            ("in_proj_bias", "out_proj.bias", "norm_in.bias", "ln_1.bias", "ln_2.bias")
        ):
            assert not found.any()
        elif "norm_in" in name or "ln_" in name:
            assert (found == 1).all()
        else:
            weight = models.aligner.state_dict()[name.replace("bias", "weight")]
            bound = weight[0].numel() ** -0.5
            if "in_proj" in name:
                bound = (6 / sum(tensor.shape)) ** 0.5
            assert 0.8 * bound < found.abs().max() <= bound
            assert found.min() < 0 < found.max()

    for name, seed in (("same", 5), ("other", 6)):
        convert_files(sdxl=str(models.sdxl), output=tmp_path / name, seed=seed)
        to_torch(tmp_path / name, tmp_path / f"{name}.safetensors")
    assert (tmp_path / "same.safetensors").read_bytes() == (tmp_path / "start.safetensors").read_bytes()
    other = safetensors.torch.load_file(tmp_path / "other.safetensors")
    different = {name for name in state if not torch.equal(state[name], other[name])}
    assert different == {name for name in models.aligner.state_dict() if "conv_in." in name or ".mlp." in name} | {
        f"information_transformer_layes.{i}.attn.{name}"
        for i in (0, 1)
        for name in ("in_proj_weight", "out_proj.weight")
    }


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_vae_smaller_than_the_lq_encoder(tmp_path, suffix):
    """The LQ encoder's sizes come from its own tensors: it computes as published, beside a VAE of other sizes."""
    models = write_published(tmp_path)
    torch.manual_seed(1)
    small = published_vae((8, 8, 16, 16), layers=2)
    randomise(small)
    shutil.rmtree(models.vae_folder)
    small.eval().save_pretrained(models.vae_folder)
    output = tmp_path / "model"
    convert_files(output, **flags(models))
    config = ModelDirectory.open(output).config
    assert (config.vae.channels, config.vae.resnets_per_level) == ((8, 8, 16, 16), 2)
    assert (config.lq_encoder.channels, config.lq_encoder.resnets_per_level) == (VAE_CHANNELS, 1)
    assert config.lq_encoder.norm_groups == config.vae.norm_groups
    to_torch(output, tmp_path / f"back.{suffix}")
    assert_same(LOADERS[suffix](tmp_path / f"back.{suffix}"), models.faithdiff_state())
    assert_same(published_part(output, "vae", rules.VAE), small.state_dict())
    model = FaithDiff.load(output)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 40, 24, 3)).astype(np.float32)
    with torch.no_grad():
        assert_parity(model.encode_lq(images), nhwc(models.lq_encoder(nchw(images))))
        assert_parity(
            model.decode(np.ones((1, 3, 5, 4), np.float32)), nhwc(small.decode(torch.ones(1, 4, 3, 5) / 0.13025).sample)
        )
    with pytest.raises(InputError, match=r"lq_encoder: cannot start from this VAE's encoder, its sizes differ"):
        fresh_part(config, "lq_encoder", lambda part: dict(ModelDirectory.open(output).arrays(part)), 0)


def test_nan_weights_are_refused_by_name(models, tree):
    state = models.faithdiff_state()
    spoilt = state["conv_in.weight"].clone()
    spoilt[0, 1, 2, 0] = float("nan")
    torch.save(state | {"conv_in.weight": spoilt}, tree["faithdiff"])
    assert_refused(tree, r"NaN or infinite are unet\.conv_in\.kernel \(--allow-nonfinite")
    arguments = [f"--{name}={tree[name]}" for name in ("sdxl", "vae", "faithdiff", "output")]
    assert main(arguments) == 2
    for wrong in ("guidance=101", "guidance=.nan", "guidanse=1", "a.b=1"):
        assert main([*arguments, "--allow-nonfinite", f"--default={wrong}"]) == 2
        assert not tree["output"].exists()
    assert main([*arguments, "--allow-nonfinite", "--default=guidance=1.5"]) == 0
    assert ModelDirectory.open(tree["output"]).defaults == {"guidance": 1.5}


def test_vae_under_vae_and_full_precision_first(models, tmp_path, tree):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(tree["vae"], pipeline / "vae")
    models.vae.save_pretrained(pipeline / "vae", variant="fp16")
    weights = pipeline / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    halves = {name: tensor.half() for name, tensor in safetensors.torch.load_file(weights).items()}
    safetensors.torch.save_file(halves, weights)
    convert_files(**tree | {"vae": str(pipeline)})
    assert ModelDirectory.open(tree["output"]).specs("vae")["quant_conv.bias"][0] == np.float32
    convert_files(**tree | {"vae": str(pipeline), "variant": "fp16", "output": tmp_path / "half"})
    assert ModelDirectory.open(tmp_path / "half").specs("vae")["quant_conv.bias"][0] == np.float16
    assert ModelDirectory.open(tmp_path / "half").specs("unet")["conv_in.bias"][0] == np.float32


def test_every_fault_of_every_file_in_one_error(models, tree):
    state = models.faithdiff_state()
    del state["conv_in.bias"], state["denoise_encoder.conv_in.weight"]
    state["spatial_ch_projs.weight"] = torch.zeros(16, 31)
    state["ema.decay"] = torch.zeros(1)
    torch.save(state, tree["faithdiff"])
    path = tree["vae"] / "diffusion_pytorch_model.safetensors"
    vae = safetensors.torch.load_file(path)
    vae["decoder.conv_in.bias"] = vae["decoder.conv_in.bias"].to(torch.int64)
    vae["post_quant_conv.bias"] = vae["post_quant_conv.bias"].double()
    safetensors.torch.save_file(vae, path)
    path = tree["sdxl"] / "text_encoder_2" / "model.safetensors"
    text = safetensors.torch.load_file(path)
    text["text_model.encoder.layers.1.mlp.fc1.bias"] = text["text_model.encoder.layers.1.mlp.fc1.bias"].half()
    del text["text_projection.weight"]
    safetensors.torch.save_file(text, path)
    message = assert_refused(tree, "^8 tensors do not fit this architecture: ")
    for fault in (
        f"{tree['faithdiff']}: missing ",
        "missing conv_in.bias (16,)",
        "missing denoise_encoder.conv_in.weight (8, 3, 3, 3)",
        "mis-shaped spatial_ch_projs.weight (16, 31), wanted (16, 32)",
        "unknown ema.decay (1,)",
        "decoder.conv_in.bias is int64, supported are float32, float16, bfloat16",
        "post_quant_conv.bias is float64",
        "missing text_projection.weight (20, 24)",
        "text_model.encoder.layers.1.mlp.fc1.bias is float16, text_model.encoder.layers.0.mlp.fc1.bias float32",
    ):
        assert fault in message


def edit(path, **changes):
    data = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(data), encoding="utf-8")


def without(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


FAULTS = {
    "no sdxl": (lambda t: without(t["sdxl"]), r"sdxl: no such folder"),
    "sdxl is a file": (lambda t: t.update(sdxl=t["faithdiff"]), "is a file; a folder or a repository id is needed"),
    "no faithdiff": (lambda t: without(t["faithdiff"]), "FaithDiff.bin: no such file"),
    "faithdiff of another kind": (lambda t: t.update(faithdiff=t["sdxl"] / "unet/config.json"), "weights are .safeten"),
    "folder without weights": (lambda t: t.update(faithdiff=t["sdxl"] / "tokenizer"), "holds no weight file"),
    "no scheduler": (lambda t: without(t["sdxl"] / "scheduler"), "it has no scheduler/scheduler_config.json$"),
    "no tokenizer": (lambda t: without(t["sdxl"] / "tokenizer_2/merges.txt"), "it has no tokenizer_2/vocab.json with"),
    "empty sdxl": (lambda t: t.update(sdxl=t["vae"]), "no unet/config.json, no text_encoder/config.json, no scheduler"),
    "no vae config": (lambda t: without(t["vae"] / "config.json"), "vae: has no config.json beside its weights"),
    "no weights": (
        lambda t: without(t["sdxl"] / "text_encoder/model.safetensors"),
        r"text_encoder: has no weights \(looked for model\.safetensors, .*pytorch_model\.bin",
    ),
    "another prediction": (
        lambda t: edit(t["sdxl"] / "scheduler/scheduler_config.json", prediction_type="flow_prediction"),
        'prediction_type is "flow_prediction": supported is "epsilon" or "v_prediction" or "sample"',
    ),
    "another unet": (
        lambda t: edit(t["sdxl"] / "unet/config.json", block_out_channels=[16, 32, 32]),
        r"tensors do not fit this architecture: .*missing .*unknown .*mis-shaped ",
    ),
    "parts that do not go together": (
        lambda t: edit(t["sdxl"] / "unet/config.json", cross_attention_dim=41),
        "its parts do not go together: unet.context_dim is 41: must be the text encoders' sum, 40",
    ),
    "a vae of another factor": (
        lambda t: edit(
            t["vae"] / "config.json",
            block_out_channels=[8, 16, 32],
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
        ),
        "its parts do not go together: lq_encoder.channels has 4 levels: must be 3, as vae.channels",
    ),
    "more layers than tensors": (
        lambda t: edit(t["vae"] / "config.json", layers_per_block=1_000_000_000),
        r"layers_per_block is 1000000000: supported is a whole number from 1 to \d+$",
    ),
    "a link out of a tokenizer": (
        lambda t: (t["sdxl"] / "tokenizer/more.json").symlink_to(t["faithdiff"]),
        r"tokenizer: more\.json is a link to a file outside",
    ),
    "no such variant": (lambda t: t.update(variant="fp17"), "variant fp17: none of the weight files"),
    "truncated": (
        lambda t: (t["vae"] / "diffusion_pytorch_model.safetensors").write_bytes(
            (t["vae"] / "diffusion_pytorch_model.safetensors").read_bytes()[:-1]
        ),
        "diffusion_pytorch_model.safetensors: cut short",
    ),
    "output has something": (
        lambda t: (t["output"].mkdir(), (t["output"] / "notes.txt").write_text("mine")),
        "exists already; remove it",
    ),
    "output is a file": (lambda t: t["output"].write_text("mine"), "exists already; remove it"),
    "output under a file": (lambda t: t.update(output=t["faithdiff"] / "model"), "cannot be written"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input(tree, fault):
    spoil, message = FAULTS[fault]
    spoil(tree)
    assert_refused(tree, message)


def test_two_weight_files_to_choose_from(tree):
    for name in ("one.bin", "two.pt"):
        shutil.copy(tree["faithdiff"], tree["vae"] / name)
    (tree["vae"] / "diffusion_pytorch_model.safetensors").rename(tree["vae"] / "three.safetensors")
    message = assert_refused(tree | {"faithdiff": tree["vae"], "vae": tree["sdxl"]}, "name one of them")
    assert "one.bin, three.safetensors, two.pt" in message


def test_an_empty_folder_as_output(tree):
    tree["output"].mkdir()
    convert_files(**tree)
    assert ModelDirectory.open(tree["output"]).config.unet.context_dim == 40


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError])
def test_nothing_is_left_of_an_interrupted_conversion(tree, error):
    def track(items, what, count):
        for i, item in enumerate(items):
            if what == "unet" and i == 5:
                raise error
            yield item

    before = sorted(tree["output"].parent.rglob("*"))
    with pytest.raises(InputError if isinstance(error, OSError) else error):
        convert_files(**tree, track=track)
    assert sorted(tree["output"].parent.rglob("*")) == before


def test_a_full_disk_is_told_before(tree, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    assert_refused(tree, r"needs 0\.0 GB, the disk has 0\.0 GB left")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.pt", "must end in .safetensors or .bin"),
        ("there.bin", "exists already"),
        ("d/x.bin", "cannot be written"),
    ],
)
def test_back_to_a_bad_output(converted, tmp_path, name, message):
    (tmp_path / "there.bin").write_text("mine")
    (tmp_path / "d").write_text("mine")
    with pytest.raises(InputError, match=message):
        to_torch(converted, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "there.bin"]


def test_back_from_a_bad_model(converted, tmp_path):
    with pytest.raises(InputError, match="no such model directory"):
        to_torch(tmp_path / "gone", tmp_path / "back.bin")
    model = shutil.copytree(converted, tmp_path / "model")
    data = yaml.safe_load((model / "config.yaml").read_text(encoding="utf-8"))
    data["model"]["alignment"]["layers"] = 3
    (model / "config.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(InputError, match=r"alignment\.safetensors does not fit config\.yaml: missing blocks\.2\."):
        to_torch(model, tmp_path / "back.safetensors")
    (model / "unet.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match=r"model: incomplete or altered: unet\.safetensors has 5 of \d+ bytes"):
        to_torch(model, tmp_path / "back.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_command(models, tmp_path, capsys):
    arguments = [f"--{name}={value}" for name, value in flags(models).items()]
    assert main([*arguments, f"--output={tmp_path / 'model'}"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'model'}\n"
    assert main(["--to-torch", str(tmp_path / "model"), "--output", str(tmp_path / "back.safetensors")]) == 0
    assert_same(safetensors.torch.load_file(tmp_path / "back.safetensors"), models.faithdiff_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --output"),
        (["--output=m"], "one of --sdxl, --run, --rrdbnet, --to-torch, --upgrade is needed"),
        (["--output=m", "--to-torch=a", "--seed=0"], "--seed goes with --sdxl only"),
        (["--output=m", "--sdxl=s", "--seed=-1"], "'-1': must be a whole number, 0 or more"),
        (["--output=m", "--sdx=s"], "unrecognized arguments: --sdx=s"),
        (["--output=m", "--sdxl=no such"], "no such: no such folder"),
        (["--output=m.bin", "--to-torch=gone"], "gone: no such model directory"),
        (["--output=m", "--to-torch=gone"], "m: the file's name must end in"),
    ],
)
def test_bad_flags_are_one_line(arguments, message, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
