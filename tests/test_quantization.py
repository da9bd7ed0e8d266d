"""Weights in 8 bits: what is rounded, by how much, and that layers, stacks, meshes and LoRA take it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from converted import published_and_converted
from flax import nnx
from lora_writer import kohya_names, write
from PIL import Image
from skimage import data

from faithdiff_jax import SMALL_MODEL, FaithDiff
from faithdiff_jax.cli.arguments import EIGHT_BITS
from faithdiff_jax.cli.main import run_command
from faithdiff_jax.errors import InputError
from faithdiff_jax.models.layers import Layers, scan_stack
from faithdiff_jax.models.parts import flatten
from faithdiff_jax.models.quantization import FEWEST, FORMATS, LARGEST, Quantized, quantize, quantized_shape
from faithdiff_jax.sharding import make_mesh

# Half a step of the largest number of a channel; of a number itself, as fp8 has three bits behind the first.
BOUNDS = {"int8": lambda kernel, largest: largest / 127 * 0.51, "fp8": lambda kernel, largest: abs(kernel) / 15 + 1e-6}


def test_names_and_limits_are_those_of_the_formats():
    assert tuple(FORMATS) == tuple(LARGEST) == EIGHT_BITS
    assert {"int8": jnp.iinfo(jnp.int8).max, "fp8": jnp.finfo(jnp.float8_e4m3fn).max} == LARGEST


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(48, 20), (5, 48, 20), (3, 3, 48, 20), (2, 3, 3, 48, 20)])
def test_each_channel_is_rounded_by_its_own_largest_number(rng, form, shape):
    kernel = rng.normal(size=shape).astype(np.float32) * rng.uniform(0.01, 10, size=shape[-1]).astype(np.float32)
    if len(shape) % 2:
        kernel *= np.arange(1, shape[0] + 1, dtype=np.float32).reshape(-1, *(1,) * (len(shape) - 1)) ** 4
    found = quantize(jnp.asarray(kernel), form)
    assert (found.shape, found.dtype, found.values.dtype) == (shape, jnp.float32, FORMATS[form])
    axes = tuple(range(len(shape) % 2, len(shape) - 1))
    largest = abs(kernel).max(axes, keepdims=True)
    assert found.scale.shape == largest.shape
    difference = abs(np.asarray(found[...]) - kernel)
    assert (difference <= BOUNDS[form](kernel, largest)).all()
    assert difference.max() > 0
    planned = quantized_shape(shape, form, jnp.float32, jax.ShapeDtypeStruct)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), planned) == jax.tree.map(lambda x: (x.shape, x.dtype), found)


@pytest.mark.parametrize("form", FORMATS)
def test_a_channel_of_zeros_stays_zero_and_bfloat16_stays_finite(rng, form):
    kernel = jnp.asarray(rng.normal(size=(16, 8)), jnp.bfloat16).at[:, 3].set(0)
    found = quantize(kernel, form)[...]
    assert found.dtype == jnp.bfloat16
    assert not found[:, 3].any()
    assert jnp.isfinite(found).all()
    np.testing.assert_allclose(found.astype(jnp.float32), kernel.astype(jnp.float32), atol=0.2)


@pytest.mark.parametrize("form", FORMATS)
def test_layers_and_stacks_compute_with_the_rounded_kernel(rng, form):
    make = Layers(nnx.Rngs(0))
    stacked = make.stack(lambda make: make.linear(8, 8), 3)
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 8)), jnp.float32)
    for module, run in (
        (make.linear(8, 4), lambda layer, x: layer(x)),
        (make.conv3x3(8, 4), lambda layer, x: layer(x)),
        (make.conv3x3(8, 8, stride=2), lambda layer, x: layer(x)),
        (stacked, lambda layers, x: scan_stack(layers, x, lambda layer, x, _: layer(x))),
    ):
        graph, state = nnx.split(module)
        params = nnx.to_pure_dict(state)
        eight = {**params, "kernel": quantize(params["kernel"], form)}
        rounded = {**params, "kernel": eight["kernel"][...]}
        apply = jax.jit(lambda params, x, graph=graph, run=run: run(nnx.merge(graph, params), x))
        np.testing.assert_allclose(apply(eight, x), apply(rounded, x), atol=1e-5)
        assert abs(apply(eight, x) - apply(params, x)).max() > 1e-4


@pytest.fixture(scope="module")
def whole():
    return FaithDiff.load(SMALL_MODEL)


PHOTOGRAPH = np.ascontiguousarray(data.astronaut()[60:124, 180:244])


@pytest.mark.parametrize(("form", "least"), [("int8", 50), ("fp8", 45)])
def test_a_restoration_in_8_bits_is_near_the_whole_one(whole, form, least):
    model = FaithDiff.load(SMALL_MODEL, quantized=form)
    pictures = [one.restore(PHOTOGRAPH, scale=1).astype(float) for one in (whole, model)]
    error = np.mean((pictures[0] - pictures[1]) ** 2)
    assert error > 0
    assert -10 * np.log10(error / 255**2) > least


@pytest.mark.parametrize("form", FORMATS)
def test_large_kernels_of_unet_and_text_encoders_alone(whole, form):
    model = FaithDiff.load(SMALL_MODEL, quantized=form)
    sizes = {}
    for part, params in model.params.items():
        for path, plain in flatten(whole.params[part]).items():
            found = flatten(params)[path]
            eight = part.startswith(("unet", "text_encoder")) and path.endswith("kernel") and plain.size >= FEWEST
            assert isinstance(found, Quantized) == eight, f"{part}.{path}"
            if not eight:
                np.testing.assert_array_equal(found, plain)
        sizes[part] = [sum(leaf.nbytes for leaf in jax.tree.leaves(one.params[part])) for one in (whole, model)]
    assert sizes["unet"][1] < 0.35 * sizes["unet"][0]
    assert sizes["vae"][1] == sizes["vae"][0]


def test_on_a_mesh_and_with_lora(tmp_path):
    pairs = {
        ("unet", "conv_in"): (torch.ones(2, 4, 3, 3), torch.ones(16, 2, 1, 1)),
        ("unet", "up_blocks.0.upsamplers.0.conv"): (torch.ones(2, 32, 3, 3), torch.full((32, 2, 1, 1), 0.25)),
    }
    folder = published_and_converted()[1]
    mesh = make_mesh(data=1, fsdp=8)
    keywords = {"loras": {str(write(tmp_path, kohya_names(pairs, 2))): 1.0}}
    plain = FaithDiff.load(folder, **keywords)
    spread = FaithDiff.load(folder, mesh=mesh)
    eight = FaithDiff.load(folder, mesh=mesh, quantized="int8", **keywords)
    count = 0
    for path, array in flatten(plain.params["unet"]).items():
        found = flatten(eight.params["unet"])[path]
        if isinstance(found, Quantized):
            count += 1
            array, rounded = np.asarray(array), np.asarray(found[...])
            largest = abs(array).max(tuple(range(array.ndim % 2, array.ndim - 1)), keepdims=True)
            assert (abs(rounded - array) <= largest / 127 * 0.51).all()
            there = flatten(spread.params["unet"])[path].sharding
            assert found.values.sharding.is_equivalent_to(there, array.ndim)
    assert count
    assert eight.restore(PHOTOGRAPH, scale=1, steps=1).shape == PHOTOGRAPH.shape


def test_the_command(tmp_path, capsys):
    Image.fromarray(PHOTOGRAPH).save(tmp_path / "a.png")
    flags = ["--input", str(tmp_path / "a.png"), "--scale", "1", "--cache", "", "--output"]
    for name, more in {"whole": [], "eight": ["--quantized", "fp8"]}.items():
        assert run_command("restore", [*flags, str(tmp_path / name), *more]) == 0
    pictures = [np.asarray(Image.open(tmp_path / name / "a.png")) for name in ("whole", "eight")]
    assert (pictures[0] != pictures[1]).any()
    records = [json.loads((tmp_path / name / "manifest.jsonl").read_text()) for name in ("whole", "eight")]
    assert [record["quantized"] for record in records] == [None, "fp8"]
    assert json.loads(Image.open(tmp_path / "eight" / "a.png").text["faithdiff"])["quantized"] == "fp8"
    capsys.readouterr()
    assert run_command("restore", [*flags, str(tmp_path / "new"), "--quantized", "int4"]) == 2
    assert "int4" in capsys.readouterr().err
    assert run_command("plan", ["--config", "stage2", "--quantized", "int8"]) == 2
    assert "--quantized: is for --restore" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"quantized 'int4': must be int8 or fp8"):
        FaithDiff.load(SMALL_MODEL, quantized="int4")
