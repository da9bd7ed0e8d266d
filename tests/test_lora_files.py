"""LoRA files of others: every way to name their tensors gives the parameters that the formula and peft give."""

import json
import re

import jax
import numpy as np
import pytest
import torch
from converted import published_and_converted
from lora_writer import RANK, UNET, kohya_names, kohya_original_names, old_names, peft_names, write
from PIL import Image

from faithdiff_jax import FaithDiff
from faithdiff_jax.cli.arguments import weighted_file
from faithdiff_jax.cli.main import run_command
from faithdiff_jax.errors import InputError
from faithdiff_jax.models.parts import flatten, numbered, part_shapes
from faithdiff_jax.sharding import make_mesh
from faithdiff_jax.weights import rules
from faithdiff_jax.weights.keymap import KeyMap
from faithdiff_jax.weights.lora_files import LoRAFile
from faithdiff_jax.weights.model_directory import ModelDirectory

TEXT = ("text_model.encoder.layers.1.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc2")


@pytest.fixture(scope="module")
def published():
    """part -> published name -> tensor, of the converted tiny model."""
    folder = published_and_converted()[1]
    return {part: state_of(part, folder, dict(ModelDirectory.open(folder).arrays(part))) for part in PARTS}


PARTS = ("unet", "text_encoder", "text_encoder_2")


def state_of(part, folder, arrays):
    keymap = KeyMap(rules.of_part(part), part_shapes(ModelDirectory.open(folder).config, part))
    return {
        name: array for entry in keymap.entries for name, array in keymap.write(entry, np.asarray(arrays[entry.path]))
    }


def factors(published, *, linear_as_convolution=False):
    """(part, module) -> down and up, for every module above."""
    torch.manual_seed(0)
    found = {}
    for part, modules in {"unet": UNET, "text_encoder": TEXT, "text_encoder_2": TEXT}.items():
        for module in modules:
            outputs, inputs, *kernel = published[part][f"{module}.weight"].shape
            kernel = kernel or [1, 1] * linear_as_convolution
            found[part, module] = (
                torch.randn(RANK, inputs, *kernel),
                torch.randn(outputs, RANK, *(1 for _ in kernel)),
            )
    return found


def expected(published, pairs, scale):
    """W + scale * up down, in float64."""
    states = {part: dict(state) for part, state in published.items()}
    for (part, module), (down, up) in pairs.items():
        product = up.double().flatten(1) @ down.double().flatten(1)
        weight = states[part][f"{module}.weight"]
        states[part][f"{module}.weight"] = weight + scale * product.numpy().reshape(weight.shape)
    return states


def check(model, states):
    folder = published_and_converted()[1]
    for part, state in states.items():
        found = state_of(part, folder, dict(flatten(model.params[part])))
        for name, array in state.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5, err_msg=f"{part}.{name}")


@pytest.mark.parametrize(
    ("names", "alpha"),
    [(peft_names, RANK), (old_names, RANK), (kohya_names, 1.5), (kohya_original_names, 0.5)],
)
def test_parameters_are_those_of_the_formula(published, tmp_path, names, alpha):
    pairs = factors(published)
    path = write(tmp_path, names(pairs, alpha))
    model = FaithDiff.load(published_and_converted()[1], loras={str(path): 0.7})
    check(model, expected(published, pairs, 0.7 * alpha / RANK))
    changed = {(part, f"{module}.weight") for part, module in pairs}
    assert len(changed) == len(UNET) + 2 * len(TEXT)


def test_two_files_add_up_and_weight_zero_changes_nothing(published, tmp_path):
    (tmp_path / "other").mkdir()
    pairs = factors(published, linear_as_convolution=True)
    first, second = write(tmp_path, kohya_names(pairs, RANK)), write(tmp_path / "other", peft_names(factors(published)))
    folder = published_and_converted()[1]
    model = FaithDiff.load(folder, loras={str(first): 1.0, str(second): -0.25})
    check(model, expected(published, factors(published), 0.75))
    for part, state in published.items():
        plain = state_of(part, folder, dict(flatten(FaithDiff.load(folder, loras={str(first): 0}).params[part])))
        for name, array in state.items():
            np.testing.assert_array_equal(plain[name], array)


def test_alpha_may_be_in_the_metadata(published, tmp_path):
    pairs = factors(published)
    settings = {"unet.lora_alpha": 6, "unet.alpha_pattern": {"conv_out": 12}, "text_encoder.lora_alpha": 1.5}
    settings |= {"text_encoder_2.use_rslora": True}
    path = write(tmp_path, peft_names(pairs), {"lora_adapter_metadata": json.dumps(settings)})
    model = FaithDiff.load(published_and_converted()[1], loras={str(path): 1})
    states = {part: dict(state) for part, state in published.items()}
    for (part, module), pair in pairs.items():
        scale = {"unet": 2, "text_encoder": 0.5, "text_encoder_2": RANK**0.5}[part] * (1 + (module == "conv_out"))
        name = f"{module}.weight"
        states[part][name] = expected({part: {name: states[part][name]}}, {(part, module): pair}, scale)[part][name]
    check(model, states)


def test_bfloat16_on_a_mesh(published, tmp_path):
    pairs = factors(published)
    path = write(tmp_path, kohya_names(pairs, RANK))
    mesh = make_mesh(data=1, fsdp=8)
    model = FaithDiff.load(published_and_converted()[1], dtype="bfloat16", mesh=mesh, loras={str(path): 1})
    plain = FaithDiff.load(published_and_converted()[1], dtype="bfloat16", mesh=mesh)
    for part, state in expected(published, pairs, 1).items():
        ours, before = dict(flatten(model.params[part])), dict(flatten(plain.params[part]))
        assert all(ours[name].dtype == before[name].dtype for name in before)
        assert all(ours[name].sharding == before[name].sharding for name in before)
        found = state_of(part, published_and_converted()[1], jax.tree.map(lambda x: x.astype("float32"), ours))
        for name, array in state.items():
            np.testing.assert_allclose(found[name], array, rtol=0.02, atol=0.02)


def test_peft_gives_the_same(published, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    models, folder = published_and_converted()
    pairs = {place: pair for place, pair in factors(published).items() if place[0] == "unet"}
    settings = {"unet.lora_alpha": 7, "unet.r": RANK, "unet.target_modules": sorted(module for _, module in pairs)}
    path = write(tmp_path, peft_names(pairs), {"lora_adapter_metadata": json.dumps(settings)})
    models.unet.load_lora_adapter(str(path.parent), weight_name=path.name, prefix="unet")
    try:
        models.unet.fuse_lora(lora_scale=0.3)
        fused = {
            name.replace(".base_layer", ""): tensor.numpy().copy() for name, tensor in models.unet.state_dict().items()
        }
    finally:
        models.unet.unfuse_lora()
        models.unet.unload_lora()
    model = FaithDiff.load(folder, loras={str(path): 0.3})
    check(model, {"unet": {name: fused[name] for name in published["unet"]}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"unet.nowhere.to_q.lora_A.weight": t.pop(A), "unet.nowhere.to_q.lora_B.weight": t.pop(B)}),
         r"is for another model: this one has no unet\.nowhere\.to_q$"),
        (lambda t: t.update({A: torch.ones(RANK, 5)}), r"is for a model of other sizes: unet\.conv_in \(3, 5\) and"),
        (lambda t: t.update({A: torch.ones(2, 4, 3, 3)}), "is for a model of other sizes"),
        (lambda t: t.update({A: torch.ones(())}), "is for a model of other sizes"),
        (lambda t: t.pop(B), r"one of two factors is missing of unet\.conv_in$"),
        (lambda t: t.update({"unet.conv_in.dora_scale": torch.ones(1)}), "is DoRA .*only plain LoRA is supported"),
        (lambda t: t.update({"lora_unet_conv_in.hada_w1_a": torch.ones(1)}), "is LoHa"),
        (lambda t: t.update({"lora_unet_conv_in.lora_mid.weight": torch.ones(1)}), "is LoCon with a core"),
        (lambda t: t.update({"unet.conv_in.bias": torch.ones(1)}), r"is no LoRA: unet\.conv_in\.bias$"),
        (lambda t: t.update({A: torch.full((RANK, 4, 3, 3), torch.nan)}), "has NaN or infinite numbers$"),
        (lambda t: t.update({"unet.conv_in.alpha": torch.tensor(torch.inf)}), r"alpha of unet\.conv_in is inf$"),
        (lambda t: t.clear(), "is no LoRA: it holds nothing"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(published, tmp_path, change, message):
    tensors = peft_names(factors(published))
    change(tensors)
    path = write(tmp_path, tensors)
    with pytest.raises(InputError, match=message) as caught:
        FaithDiff.load(published_and_converted()[1], loras={str(path): 1})
    assert "\n" not in str(caught.value)
    assert re.match(re.escape(str(path)), str(caught.value))


A, B = "unet.conv_in.lora_A.weight", "unet.conv_in.lora_B.weight"


@pytest.mark.parametrize("text", ["nonsense", "[1]", '{"unet.lora_alpha": "six"}', "[" * 5000])
def test_metadata_that_says_nothing(published, tmp_path, text):
    path = write(tmp_path, peft_names(factors(published)), {"lora_adapter_metadata": text})
    with pytest.raises(InputError, match="metadata"):
        LoRAFile.open(path, ModelDirectory.open(published_and_converted()[1]).config)


def test_a_file_for_two_text_encoders_does_not_fit_one(published, tmp_path):
    path = write(
        tmp_path, peft_names({place: pair for place, pair in factors(published).items() if place[0] != "unet"})
    )
    config = ModelDirectory.open(published_and_converted(sd21=True)[1]).config
    assert numbered("text_encoder", len(config.text_encoders)) == ("text_encoder",)
    with pytest.raises(InputError, match="another model"):
        LoRAFile.open(path, config)


@pytest.mark.parametrize(
    ("text", "file", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1), ("a.safetensors=0.8", "a.safetensors", 0.8), ("a=b", "a=b", 1),
        ("a=b=-2", "a=b", -2), ("a=1e-1", "a", 0.1), ("5", "5", 1),
    ],
)  # fmt: skip
def test_a_file_and_its_weight(text, file, weight):
    assert weighted_file(text) == (file, weight)


def test_restore_adds_it(published, tmp_path, capsys):
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(tmp_path / "a.png")
    path = write(tmp_path, kohya_names(factors(published), RANK))
    model = str(published_and_converted()[1])
    flags = ["--model", model, "--input", str(tmp_path / "a.png"), "--steps", "1", "--cache", "", "--scale", "1"]
    results = {}
    for name, more in {"plain": [], "zero": [f"--lora={path}=0"], "whole": [f"--lora={path}"]}.items():
        assert run_command("restore", [*flags, "--output", str(tmp_path / name), *more]) == 0
        results[name] = np.asarray(Image.open(tmp_path / name / "a.png"))
    np.testing.assert_array_equal(results["zero"], results["plain"])
    assert (results["whole"] != results["plain"]).any()
    capsys.readouterr()
    for more, message in (
        ([f"--lora={path}", f"--lora={path}=2"], "a file is given twice"),
        ([f"--lora={tmp_path / 'none.safetensors'}"], "none.safetensors: no such"),
        ([f"--lora={path}=nan"], "must be FILE or FILE=WEIGHT"),
        ([f"--lora={tmp_path / 'a.png'}"], "a LoRA is read from a .safetensors file"),
    ):
        assert run_command("restore", [*flags, "--output", str(tmp_path / "new"), *more]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
        assert not (tmp_path / "new").exists()
