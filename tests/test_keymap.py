"""The rules between published tensors and ours, held to the published list of names and shapes."""

import math
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.faithdiff import FaithDiffModel
from faithdiff_jax.models.parts import flatten, unflatten
from faithdiff_jax.weights import rules
from faithdiff_jax.weights.keymap import CONV, LINEAR, NORM, KeyMap, Rule, compare

PUBLISHED = Path(__file__).parent / "data" / "faithdiff_tensors.txt"


def published_list() -> dict[str, tuple[int, ...]]:
    """The 1,814 tensors of FaithDiff.bin: one line each, name and shape."""
    lines = [line.split() for line in PUBLISHED.read_text(encoding="utf-8").splitlines()]
    return {name: tuple(int(size) for size in shape) for name, *shape in lines}


def test_the_model_has_exactly_the_published_tensors():
    config = FaithDiffConfig()
    model = nnx.eval_shape(lambda: FaithDiffModel(config.unet, config.alignment, config.vae.encoder, rngs=nnx.Rngs(0)))
    shapes = {path: leaf.shape for path, leaf in flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param))).items()}
    published = published_list()
    assert len(published) == 1814
    assert sum(math.prod(shape) for shape in published.values()) == pytest.approx(2.612e9, rel=1e-3)
    assert KeyMap(rules.FAITHDIFF, shapes).published_shapes() == published

    # Part by part, as the converter reads them.
    found = []
    for prefix, part in (("lq_encoder", "lq_encoder"), ("denoiser.alignment", "alignment"), ("denoiser.unet", "unet")):
        inner = {path.removeprefix(f"{prefix}."): shapes[path] for path in shapes if path.startswith(f"{prefix}.")}
        found += KeyMap(rules.of_part(part), inner).published_shapes().items()
    assert len(found) == len(published)
    assert dict(found) == published


def small_keymap() -> KeyMap:
    layer = [Rule("blocks.{*}.proj", "stack.proj", LINEAR), Rule("blocks.{*}.norm", "stack.norm", NORM)]
    shapes = {
        "down.3.conv.kernel": (3, 1, 2, 5),
        "down.3.conv.bias": (5,),
        "stack.proj.kernel": (4, 2, 3),
        "stack.proj.bias": (4, 3),
        "stack.norm.scale": (4, 2),
        "stack.norm.bias": (4, 2),
    }
    return KeyMap([Rule("d.{i}.c", "down.{i}.conv", CONV), *layer], shapes)


def test_published_shapes_undo_layout_and_stack():
    shapes = small_keymap().published_shapes()
    assert shapes["d.3.c.weight"] == (5, 2, 3, 1)
    assert shapes["blocks.3.proj.weight"] == (3, 2)
    assert len(shapes) == 2 + 4 * 4


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_there_and_back_is_the_same(rng, dtype):
    keymap = small_keymap()
    published = {name: rng.normal(size=shape).astype(dtype) for name, shape in keymap.published_shapes().items()}
    ours = dict(keymap.read(published.__getitem__))
    assert {path: array.shape for path, array in ours.items()} == {e.path: e.shape for e in keymap.entries}
    np.testing.assert_array_equal(ours["stack.proj.kernel"][2], published["blocks.2.proj.weight"].T)
    np.testing.assert_array_equal(ours["down.3.conv.kernel"][2, 0, 1, 4], published["d.3.c.weight"][4, 1, 2, 0])
    back = {name: array for entry in keymap.entries for name, array in keymap.write(entry, ours[entry.path])}
    assert back.keys() == published.keys()
    for name, array in back.items():
        assert array.dtype == dtype
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, published[name])


def test_every_fault_is_named_at_once():
    keymap = small_keymap()
    found = keymap.published_shapes()
    del found["blocks.0.norm.bias"], found["d.3.c.weight"]
    found |= {"blocks.4.norm.bias": (2,), "blocks.1.proj.weight": (2, 3)}
    assert sorted(compare(keymap.published_shapes(), found)) == [
        "mis-shaped blocks.1.proj.weight (2, 3), wanted (3, 2)",
        "missing blocks.0.norm.bias (2,)",
        "missing d.3.c.weight (5, 2, 3, 1)",
        "unknown blocks.4.norm.bias (2,)",
    ]


@pytest.mark.parametrize(
    ("names", "count"), [(["other"], 0), (["down.{i}.conv", "down.{j}.conv"], 2)], ids=["none", "two"]
)
def test_a_parameter_needs_exactly_one_rule(names, count):
    with pytest.raises(ValueError, match=rf"^{count} rules speak for the parameter down\.1\.conv\.bias"):
        KeyMap([Rule(name, name, CONV) for name in names], {"down.1.conv.bias": (5,)})


def test_flatten_and_unflatten_are_inverse():
    params = {"blocks": {0: {"kernel": 1}, 12: {"kernel": 2}}, "linear_1": {"bias": 3}}
    assert flatten(params) == {"blocks.0.kernel": 1, "blocks.12.kernel": 2, "linear_1.bias": 3}
    assert unflatten(flatten(params)) == params
