"""Guidance in a part of the schedule, DeepCache and T-GATE: whole loops against PyTorch, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from converted import loaded, published_and_converted
from parity import assert_parity, nchw, nhwc
from published import unet_sd21, unet_sdxl
from test_attribution import inputs_of
from test_parity_models import SD21, SDXL
from test_parity_sampling import Pair
from test_pipeline import levels_apart, photograph
from torch_pipeline import denoise
from torch_reuse import DeepCache, TGate

from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.evaluations import Evaluation, plan_evaluations
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def sdxl():
    return Pair(unet_sdxl(40), SDXL)


def in_torch(pair, inputs, options, evaluations):
    """The published loop, in which each step does what its entry says."""
    caches = [DeepCache(pair.unet, options.deepcache_levels), TGate(pair.unet)]
    deep, gate = caches
    sides = [
        tuple(None if x is None else torch.from_numpy(np.asarray(x)) for x in (side.context, side.pooled))
        for side in (inputs.negative, inputs.text)
        if side is not None
    ]

    def texts_of(step, tile):
        now = evaluations[step]
        deep.leave_out = now.shallow
        gate.state = "frozen" if now.frozen else "keep" if now.keep_attended else "attend"
        return sides if now.guided else sides[-1:]

    def predict(x, t, features, context, pooled, ids):
        deep.tile = gate.tile = None if ids is None else tuple(ids[0, 2:4].tolist())
        deep.side = next(i for i, side in enumerate(sides) if side[0] is context)
        return pair.torch_predict(x, t, features, context, pooled, ids)

    height, width = inputs.noise.shape[1:3]
    try:
        return nhwc(
            denoise(
                predict,
                nchw(inputs.features),
                texts_of,
                nchw(inputs.noise),
                steps=options.steps,
                guidance=float(inputs.guidance),
                start=nchw(inputs.start),
                image_size=(8 * height, 8 * width),
                tile=options.tile,
                overlap=options.overlap,
            )
        )
    finally:
        for handle in [handle for cache in caches for handle in cache.handles]:
            handle.remove()


def check(pair, rng, size, *, added=True, negative_length=6, **given):
    options = RestoreOptions(steps=6, **given)
    plan, inputs = inputs_of(
        rng, size, options, guidance=options.guidance, negative_length=negative_length, added=added
    )
    expected = in_torch(pair, inputs, options, plan.evaluations)
    assert_parity(pair.sample(pair.parameters, plan, inputs), expected)


ONE_TILE, TILES = (7, 9), (13, 11)


@pytest.mark.parametrize(
    ("size", "given"),
    [
        (ONE_TILE, {"guidance_start": 0.3, "guidance_end": 0.7}),
        (ONE_TILE, {"guidance_end": 0.5, "negative_length": 4}),
        (TILES, {"deepcache_interval": 2, "deepcache_levels": 2, "tile": 8, "batch": 2, "negative_length": 4}),
        (ONE_TILE, {"deepcache_interval": 4, "guidance_start": 0.3, "guidance_end": 0.9}),
        (ONE_TILE, {"tgate_after": 0.5}),
        (TILES, {"tgate_after": 0.0, "tile": 8, "batch": 4, "negative_length": 4}),
        (TILES, {"tgate_after": 0.6, "deepcache_interval": 3, "guidance_start": 0.2, "tile": 8}),
    ],
    ids=str,
)
def test_whole_loops_equal_pytorch(sdxl, rng, size, given):
    check(sdxl, rng, size, **given)


def test_sd21(rng):
    check(Pair(unet_sd21(16), SD21), rng, (6, 10), added=False, tgate_after=0.5, deepcache_interval=2)


def kinds(**given):
    """One letter a step: guided or plain; small where the deep levels are left out; ! keeps the text, _ is frozen."""
    letters = []
    for each in plan_evaluations(RestoreOptions(**given)):
        letter = "G" if each.guided else "P"
        letters.append((letter.lower() if each.shallow else letter) + "!" * each.keep_attended + "_" * each.frozen)
    return " ".join(letters)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"steps": 3}, "G G G"),
        ({"steps": 3, "guidance": 1}, "P P P"),
        ({"steps": 5, "guidance_start": 0.2, "guidance_end": 0.6}, "P G G P P"),
        ({"steps": 7, "deepcache_interval": 3}, "G g g G g g G"),
        ({"steps": 7, "deepcache_interval": 3, "guidance_end": 0.5}, "G g g G P p p"),
        ({"steps": 5, "tgate_after": 0.4}, "G G! P_ P_ P_"),
        ({"steps": 4, "tgate_after": 0}, "G! P_ P_ P_"),
        ({"steps": 20, "tgate_after": 0.95}, "G " * 18 + "G! P_"),
        ({"steps": 1, "tgate_after": 0, "deepcache_interval": 9}, "G"),
        ({"steps": 7, "tgate_after": 0.5, "deepcache_interval": 3}, "G g g G! P_ p_ p_"),
        ({"timesteps": [900, 500, 1], "guidance_end": 0.5}, "G G P"),
    ],
)
def test_what_each_step_evaluates(given, wanted):
    assert kinds(**given) == wanted


def test_options_that_leave_nothing_out_change_nothing(sdxl, rng):
    plan, _ = inputs_of(rng, ONE_TILE, RestoreOptions(steps=3))
    same, _ = inputs_of(rng, ONE_TILE, RestoreOptions(steps=3, deepcache_interval=1, deepcache_levels=2, tgate_after=1))
    assert plan == same
    assert set(plan.evaluations) == {Evaluation(guided=True)}


def test_on_a_mesh_and_step_by_step():
    """The same picture on eight devices, and with a look in after every step."""
    given = {"guidance_start": 0.25, "deepcache_interval": 2, "tgate_after": 0.5}
    model, image = loaded(), photograph(43, 51)
    options = {"steps": 4, "tile": 8, "batch": 4, **given}
    alone = model.restore(image, "the cat", **options)
    assert levels_apart(alone, model.restore(image, "the cat", on_step=lambda *_: None, **options))[0] <= 1
    spread = FaithDiff.load(published_and_converted()[1], mesh=make_mesh(data=4, fsdp=2))
    largest, share = levels_apart(alone, spread.restore(image, "the cat", **options))
    assert largest <= 1
    assert share < 0.01
    assert levels_apart(alone, model.restore(image, "the cat", steps=4, tile=8))[0] > 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guidance_start": 1.1}, "guidance_start is 1.1: must be from 0 to 1"),
        ({"guidance_end": float("nan")}, "guidance_end is nan: must be from 0 to 1"),
        ({"guidance_start": 0.5, "guidance_end": 0.4}, "guidance_end is 0.4: must be at least guidance_start, 0.5"),
        ({"deepcache_interval": 0}, "deepcache_interval is 0: must be a whole number from 1 to 1000"),
        ({"tgate_after": -0.1}, "tgate_after is -0.1: must be from 0 to 1"),
    ],
)
def test_options_that_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        RestoreOptions(**values)


def test_what_a_model_refuses():
    config = FaithDiffConfig()
    RestoreOptions(deepcache_interval=2, deepcache_levels=2).check_against(config)
    with pytest.raises(InputError, match=r"^deepcache_levels is 3: must be below 3, the levels of this model's UNet$"):
        RestoreOptions(deepcache_interval=2, deepcache_levels=3).check_against(config)
    fed = dataclasses.replace(config, unet=dataclasses.replace(config.unet, guidance_dim=256))
    RestoreOptions(tgate_after=0.5).check_against(fed)
    with pytest.raises(InputError, match=r"guidance_start is 0 and guidance_end 0.5: must be 0 and 1 for a model that"):
        RestoreOptions(guidance_end=0.5).check_against(fed)


@pytest.mark.parametrize("given", [{"deepcache_interval": 2}, {"tgate_after": 0.5}])
def test_maps_need_every_attention(given):
    with pytest.raises(InputError, match="attribution: needs all attention to the text at every step, "):
        loaded().attribute(photograph(16, 16), "the cat", ["cat"], steps=3, **given)
