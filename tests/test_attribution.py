"""Attribution maps: the whole denoising loop against DAAM in PyTorch, and what the maps cost where nobody asks."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from converted import loaded
from flax import nnx
from parity import assert_parity, nchw, nhwc
from port import normal
from published import unet_sd21, unet_sdxl
from test_parity_models import SD21, SDXL
from test_parity_sampling import CONFIG, Pair
from test_pipeline import levels_apart, noises, photograph
from torch_attribution import blended, enlarged, recorded
from torch_pipeline import denoise, grid

from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.denoise import denoise as denoise_ours
from faithdiff_jax.inference.denoise import denoise_and_attribute
from faithdiff_jax.inference.inputs import SamplingInputs, Text, plan_sampling
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.models.attribution import bicubic, mean_map

STEPS, LENGTH = 3, 6


@pytest.fixture(scope="module")
def sdxl():
    return Pair(unet_sdxl(40), SDXL)


def words_of(rng, batch):
    """(B, LENGTH, 2): a word of two tokens and one of one, other ones for each picture."""
    words = np.zeros((batch, LENGTH, 2), np.float32)
    for each in words:
        first, second, third = rng.permutation(LENGTH)[:3]
        each[[first, second], 0], each[third, 1] = 0.5, 1
    return words


def inputs_of(rng, size, options, *, batch=1, guidance=5.0, negative_length=LENGTH, added=True):
    """The plan and the arrays of one loop, as ours takes them."""
    plan = plan_sampling(options, CONFIG, *size)
    dim = 40 if added else 16
    negative, text = (
        Text(context=normal(rng, batch, n, dim), pooled=normal(rng, batch, 20) if added else None)
        for n in (negative_length, LENGTH)
    )
    target = 8 * options.tile
    inputs = SamplingInputs(
        features=normal(rng, batch, *size, 32),
        text=text,
        negative=negative if guidance > 1 else None,
        noise=normal(rng, batch, *size, 4),
        start=normal(rng, batch, *size, 4),
        time_ids=np.array([[(8 * size[0], 8 * size[1], *at, target, target)] for at in plan.corners], np.float32),
        guidance=jnp.float32(guidance),
    )
    return plan, inputs


def in_torch(pair, inputs, words, options):
    """Latents and maps of the published procedure, NHWC, picture by picture."""
    batch, height, width, _ = inputs.noise.shape
    latents, maps = [], []
    for i in range(batch):
        item = slice(i, i + 1)
        sides = [side for side in (inputs.negative, inputs.text) if side is not None]
        texts = [
            tuple(None if x is None else torch.from_numpy(x[item]) for x in (side.context, side.pooled))
            for side in sides
        ]
        with recorded(pair.unet) as recorder:
            result = denoise(
                pair.torch_predict,
                nchw(inputs.features[item]),
                texts,
                nchw(inputs.noise[item]),
                steps=options.steps,
                guidance=float(inputs.guidance),
                start=nchw(inputs.start[item]),
                image_size=(8 * height, 8 * width),
                tile=options.tile,
                overlap=options.overlap,
            )
        calls = recorder.calls[len(texts) - 1 :: len(texts)]  # the caption's
        corners, *tile = grid(height, width, options.tile, options.overlap)
        per_tile = [torch.tensor(words[i]).T @ enlarged(heads, *tile).mean(0).flatten(1) for heads in calls]
        per_tile = [found.unflatten(1, tuple(tile)) for found in per_tile]
        steps = [per_tile[at : at + len(corners)] for at in range(0, len(per_tile), len(corners))]
        assert len(steps) == options.steps
        latents.append(nhwc(result))
        maps.append(nhwc(sum(blended(step, height, width, options.tile, options.overlap) for step in steps)[None]))
    return np.concatenate(latents), np.concatenate(maps) / options.steps


@pytest.mark.parametrize(
    ("size", "settings", "given"),
    [
        ((13, 11), {"tile": 8, "batch": 2}, {"batch": 2}),
        ((7, 9), {}, {"negative_length": 4}),
    ],
)
def test_the_whole_loop_equals_the_published_method(sdxl, rng, size, settings, given):
    check(sdxl, rng, size, RestoreOptions(steps=STEPS, **settings), **given)


def test_another_unet_without_guidance(rng):
    check(Pair(unet_sd21(16), SD21), rng, (6, 10), RestoreOptions(steps=2), added=False, guidance=1.0)


def check(pair, rng, size, options, **given):
    plan, inputs = inputs_of(rng, size, options, **given)
    words = words_of(rng, len(inputs.noise))
    run = lambda parameters, inputs, words: denoise_and_attribute(  # noqa: E731
        nnx.merge(pair.graph, parameters), plan, inputs, words
    )
    latents, maps = jax.jit(run)(pair.parameters, inputs, words)
    expected_latents, expected = in_torch(pair, inputs, words, options)
    assert_parity(latents, expected_latents)
    assert_parity(maps, expected)


def arrays_in(jaxpr):
    """Shapes of everything that a program computes, inside its loops too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from arrays_in(inner)


def test_maps_that_nobody_asks_for_are_not_computed(sdxl, rng):
    plan, inputs = inputs_of(rng, (13, 11), RestoreOptions(steps=STEPS, tile=8))
    words = jnp.ones((1, LENGTH, 7))  # no other axis has seven elements
    trace = lambda run: jax.make_jaxpr(  # noqa: E731
        lambda parameters, inputs: run(nnx.merge(sdxl.graph, parameters), plan, inputs)
    )(sdxl.parameters, inputs)
    plain = trace(denoise_ours)
    asked = trace(lambda denoiser, plan, inputs: denoise_and_attribute(denoiser, plan, inputs, words))
    assert [output.shape for output in plain.out_avals] == [(1, 13, 11, 4)]
    assert [output.shape for output in asked.out_avals] == [(1, 13, 11, 4), (1, 13, 11, 7)]
    assert not [shape for shape in arrays_in(plain.jaxpr) if shape[-1:] == (7,)]
    assert [shape for shape in arrays_in(asked.jaxpr) if shape[-1:] == (7,)]
    assert str(trace(lambda *given: denoise_and_attribute(*given, None)[0])) == str(plain)


@pytest.mark.parametrize(("old", "new"), [((5, 7), (13, 10)), ((4, 4), (4, 4)), ((1, 3), (2, 12))])
def test_enlarging_equals_pytorch(rng, old, new):
    maps = normal(rng, 1, *old, 2)
    expected = torch.nn.functional.interpolate(nchw(maps), size=new, mode="bicubic", align_corners=False)
    assert_parity(mean_map([jnp.asarray(maps)], 1, new), nhwc(expected), 1e-6)
    np.testing.assert_allclose(bicubic(old[0], new[0]).sum(axis=1), 1, rtol=1e-6)


def test_a_model_without_transformers_to_attribute_to():
    with pytest.raises(InputError, match="in the middle of its UNet only"):
        mean_map([], 0, (4, 4))


def test_maps_of_a_restoration(rng):
    """The picture is that of `restore`, and the maps are those of the loop, enlarged and without the padding."""
    model, image = loaded(), photograph(43, 51)
    options = {"scale": 2, "steps": 2, "noise": noises(rng, 11, 13)}
    restored, maps = model.attribute(image, "the cat", ["cat", "The", "cat"], **options)
    largest, share = levels_apart(restored, model.restore(image, "the cat", **options))
    assert largest <= 1  # another program rounds otherwise
    assert share < 0.001
    assert list(maps) == ["cat", "The"]
    for each in maps.values():
        assert (each.shape, each.dtype) == ((86, 102), np.float32)
        assert 0 <= each.min() < each.max() < 1
    _, both = model.attribute(image, "the cat", ["the cat", "cat"], **options)
    np.testing.assert_allclose(both["the cat"], (maps["The"] + maps["cat"]) / 2, atol=1e-6)
    with pytest.raises(InputError, match="word is 'dog': must be in the caption, 'the cat'"):
        model.attribute(image, "the cat", ["cat", "dog"], **options)
    for none in ([], "cat"):
        with pytest.raises(InputError, match="must be a list of words of the caption, at least one"):
            model.attribute(image, "the cat", none, **options)
