"""Samplers, spacings and timesteps of one's own against diffusers' schedulers, over whole loops of a toy predictor."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from parity import assert_parity, nchw, nhwc
from port import normal
from torch_pipeline import SCHEDULE

from faithdiff_jax.diffusion import samplers, schedule
from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.models.config import FaithDiffConfig

CONFIG = schedule.ScheduleConfig()
THEIRS = {
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
OWN = (999, 870, 640, 639, 300, 80, 0)


def their_scheduler(name, steps, *, prediction="epsilon", spacing="leading", sigma_spacing="default", visited=None):
    kind = "original_sample" if name == "euler" and prediction == "sample" else prediction
    settings = {f"use_{sigma_spacing}_sigmas": True} if sigma_spacing != "default" else {}
    scheduler = THEIRS[name](timestep_spacing=spacing, prediction_type=kind, **SCHEDULE, **settings)
    if visited is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=list(visited))
    scheduler.set_begin_index(0)
    return scheduler


def toy(x, t, tanh):
    """A model that both frameworks can run; it depends on the timestep."""
    return tanh(x) * (0.5 + t / 2000)


def check(rng, name, *, steps=7, prediction="epsilon", spacing="leading", from_lq=False, **given):
    """One loop in both frameworks: timesteps, noise levels and the latent at the end."""
    x, start = normal(rng, 2, 4, 5, 4), normal(rng, 2, 4, 5, 4)
    theirs = their_scheduler(name, steps, prediction=prediction, spacing=spacing, **given)
    config = dataclasses.replace(CONFIG, prediction=prediction, spacing=spacing)
    sampler = samplers.SAMPLERS[name](config, steps, **given)
    # What diffusers cuts off to whole numbers has its own rounding: 998.99999 and 999 are one timestep apart.
    cut = name != "euler" and given.get("sigma_spacing") == "exponential"
    np.testing.assert_allclose(sampler.timesteps(), theirs.timesteps.numpy(), rtol=1e-5, atol=1 if cut else 1e-3)
    np.testing.assert_allclose(sampler.sigmas(), theirs.sigmas.numpy(), rtol=1e-5)
    if spacing == "leading":  # under "trailing" diffusers starts Euler from sigma_max alone
        np.testing.assert_allclose(sampler.init_noise_scale, float(theirs.init_noise_sigma), rtol=1e-5)

    expected = nchw(x) * sampler.init_noise_scale
    latents = jnp.asarray(x) * sampler.init_noise_scale
    if from_lq:
        expected = DDPMScheduler(**SCHEDULE).add_noise(nchw(start), expected, torch.tensor([999]))
        latents = schedule.add_noise(config, start, latents, 999)
    for t in theirs.timesteps:
        output = toy(theirs.scale_model_input(expected, t), t, torch.tanh)
        expected = theirs.step(output, t, expected).prev_sample

    def predict_noise(x, condition):
        t, alpha = condition
        return schedule.noise_at(prediction, toy(x, t, jnp.tanh), x, alpha)

    ours = sampler.sample(predict_noise, latents, (jnp.asarray(theirs.timesteps.numpy()), sampler.alphas()))
    assert_parity(ours, nhwc(expected))


@pytest.mark.parametrize("prediction", schedule.PREDICTIONS)
@pytest.mark.parametrize("name", THEIRS)
def test_what_the_model_predicts(rng, name, prediction):
    for from_lq in (False, True):
        check(rng, name, prediction=prediction, from_lq=from_lq)


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 60])
@pytest.mark.parametrize("name", THEIRS)
def test_numbers_of_steps(rng, name, steps):
    check(rng, name, steps=steps)
    check(rng, name, steps=steps, spacing="trailing")


@pytest.mark.parametrize("sigma_spacing", ["karras", "exponential"])
@pytest.mark.parametrize("name", THEIRS)
def test_spacings(rng, name, sigma_spacing):
    for prediction in ("epsilon", "v_prediction"):
        check(rng, name, steps=9, prediction=prediction, sigma_spacing=sigma_spacing)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])  # diffusers' UniPC takes no timesteps
def test_timesteps_of_ones_own(rng, name):
    check(rng, name, steps=len(OWN), visited=OWN)


def test_timesteps_of_ones_own_that_are_those_of_the_schedule(rng):
    x = jnp.asarray(normal(rng, 1, 4, 5, 4))
    for name in samplers.SAMPLERS:
        plain = samplers.SAMPLERS[name](CONFIG, 4)
        given = samplers.SAMPLERS[name](CONFIG, 4, visited=tuple(int(t) for t in plain.timesteps()))
        fresh = jnp.asarray(normal(rng, 4, 1, 4, 5, 4))
        ends = [
            sampler.sample(lambda x, t: toy(x, t, jnp.tanh), x, jnp.asarray(sampler.timesteps()), fresh)
            for sampler in (plain, given)
        ]
        assert_parity(ends[1], ends[0], 1e-6)


def test_ancestral_timesteps_of_ones_own(rng, monkeypatch):
    x, fresh = normal(rng, 2, 4, 5, 4), normal(rng, len(OWN), 2, 4, 5, 4)
    draws = iter(fresh)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: nchw(next(draws)))
    theirs = DDPMScheduler(clip_sample=False, **SCHEDULE)
    theirs.set_timesteps(timesteps=list(OWN))
    expected = nchw(x)
    for t in theirs.timesteps:
        expected = theirs.step(toy(expected, t, torch.tanh), t, expected).prev_sample
    sampler = samplers.DDPM(CONFIG, len(OWN), visited=OWN)
    ours = sampler.sample(
        lambda x, t: toy(x, t, jnp.tanh), jnp.asarray(x), jnp.asarray(sampler.timesteps()), jnp.asarray(fresh)
    )
    assert_parity(ours, nhwc(expected))


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_walk_in_parts_is_the_walk(rng, name):
    x, fresh = jnp.asarray(normal(rng, 1, 4, 5, 4)), jnp.asarray(normal(rng, 5, 1, 4, 5, 4))
    sampler = samplers.SAMPLERS[name](CONFIG, 5)
    times = jnp.asarray(sampler.timesteps())

    def predict(x, t, visits):
        return toy(x, t, jnp.tanh), visits + 1

    whole = sampler.walk(predict, sampler.begin(x, 0), times, fresh)
    carry = sampler.begin(x, 0)
    for part in ((0, 2), (2, 3), (3, 5)):
        carry = sampler.walk(predict, carry, times, fresh, part)
    assert int(carry.memory) == int(whole.memory) == 5
    assert_parity(carry.latents, whole.latents, 1e-6)  # other programs, which may round otherwise


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"timesteps": [1, 2]}, r"timesteps is \[1, 2\]: must be whole numbers from 99999 to 0, each below the one be"),
        ({"timesteps": (900, 900)}, r"timesteps is \(900, 900\): must be whole numbers"),
        ({"timesteps": [5, -1]}, r"timesteps is \[5, -1\]: must be whole numbers"),
        ({"timesteps": [900, 1.5]}, r"timesteps is \[900, 1.5\]: must be whole numbers"),
        ({"timesteps": []}, r"timesteps is \[\]: must be whole numbers"),
        ({"timesteps": "951"}, r"timesteps is '951': must be whole numbers"),
        ({"sigma_spacing": "beta"}, "sigma_spacing is 'beta': must be one of default, karras, exponential"),
        ({"sigma_spacing": "karras", "sampler": "ddpm"}, "sigma_spacing is 'karras': must be default for sampler ddpm"),
        ({"sigma_spacing": "karras", "timesteps": [9, 1]}, "must be default where timesteps are given"),
    ],
)
def test_options_that_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        RestoreOptions(**values)


def test_what_a_model_refuses():
    config = FaithDiffConfig()
    RestoreOptions(timesteps=[999, 0], steps=5000).check_against(config)
    RestoreOptions(sampler="unipc", steps=999).check_against(config)
    with pytest.raises(InputError, match=r"timesteps is \(1000, 1\): must be below 1000 for this model"):
        RestoreOptions(timesteps=[1000, 1]).check_against(config)
    with pytest.raises(InputError, match="steps is 1000: must be between 1 and 999 for this model and sampler unipc"):
        RestoreOptions(sampler="unipc", steps=1000).check_against(config)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sigma_spacing": "beta"}, "sigma_spacing is 'beta'"),
        ({"visited": (9, 9)}, r"visited is \(9, 9\): must be 2 falling timesteps from 999 to 0"),
        ({"visited": (1000, 9)}, "must be 2 falling timesteps"),
        ({"visited": (9, 5, 1)}, "must be 2 falling timesteps"),
        ({"visited": (9, 5), "sigma_spacing": "karras"}, "must be 'default' with timesteps of one's own"),
    ],
)
def test_samplers_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        samplers.Euler(CONFIG, 2, **given)


def test_several_steps_leave_room_for_one_more():
    with pytest.raises(ValueError, match="steps is 1000: must be between 1 and 999"):
        samplers.UniPC(CONFIG, 1000).timesteps()


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_timesteps_past_the_last_one(rng, name):
    """An offset leads several steps past the schedule's end: they stay where they are, and nothing is divided by 0."""
    sampler = samplers.SAMPLERS[name](dataclasses.replace(CONFIG, steps_offset=49), 332)
    assert sampler.timesteps()[0] > 999
    x = jnp.asarray(normal(rng, 1, 4, 5, 4))
    end = sampler.sample(lambda x, t: toy(x, t, jnp.tanh), x, jnp.asarray(sampler.timesteps()))
    assert np.isfinite(np.asarray(end)).all()
