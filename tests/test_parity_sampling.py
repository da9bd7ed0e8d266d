"""The whole denoising loop against PyTorch and diffusers' schedulers: tiles, starts, guidance, ancestral sampling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from flax import nnx
from parity import assert_parity, nchw, nhwc
from port import normal, port
from published import randomise, unet_sd21, unet_sdxl
from test_parity_models import SD21, SDXL, VAE_CONFIG
from test_samplers import their_scheduler
from torch_aligner import TorchAligner
from torch_pipeline import SCHEDULE, denoise, euler_scheduler

from faithdiff_jax.diffusion import samplers, schedule
from faithdiff_jax.diffusion.sampler import Sampler
from faithdiff_jax.inference.denoise import denoise as denoise_ours
from faithdiff_jax.inference.inputs import SamplingInputs, Text, plan_sampling
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.faithdiff import Denoiser
from faithdiff_jax.weights import rules

CONFIG = schedule.ScheduleConfig()
PREDICTS = {name: dataclasses.replace(CONFIG, prediction=name) for name in schedule.PREDICTIONS}
DENOISER_RULES = [
    *(rule.under("", "alignment.") for rule in rules.ALIGNMENT),
    *(rule.under("", "unet.") for rule in rules.UNET),
]


class Pair:
    """The same random denoiser in both frameworks."""

    def __init__(self, unet, unet_config, mixing="none"):
        torch.manual_seed(3)
        self.unet, self.aligner = unet, TorchAligner(32, 16)
        for module in (self.unet, self.aligner):
            randomise(module)
            module.eval()
        state = self.aligner.state_dict() | self.unet.state_dict()
        config = AlignmentConfig(mixing=mixing)
        build = lambda: Denoiser(unet_config, config, VAE_CONFIG.channels[-1], rngs=nnx.Rngs(0))  # noqa: E731
        self.graph, self.parameters = nnx.split(port(build, DENOISER_RULES, state))
        self.sample = jax.jit(
            lambda parameters, plan, inputs: denoise_ours(nnx.merge(self.graph, parameters), plan, inputs),
            static_argnums=1,
        )

    def torch_predict(self, latents, timesteps, features, context, pooled, time_ids):
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
        hook = self.unet.conv_in.register_forward_hook(lambda module, args, hidden: self.aligner(hidden, features))
        try:
            with torch.no_grad():
                return self.unet(latents, timesteps, context, added_cond_kwargs=added).sample
        finally:
            hook.remove()


@pytest.fixture(scope="module")
def sdxl():
    return Pair(unet_sdxl(40), SDXL)


def check_loop(
    pair,
    rng,
    *,
    size,
    steps=3,
    guidance=5.0,
    rescale=0.0,
    lr=True,
    tile=128,
    overlap=0.5,
    tile_batch=1,
    batch=1,
    lengths=(5, 5),
    added=True,
    config=CONFIG,
    sampler="euler",
    by_tile=False,
):
    height, width = size
    features, noise = normal(rng, batch, height, width, 32), normal(rng, batch, height, width, 4)
    start = normal(rng, batch, height, width, 4) if lr else None
    dim = 40 if added else 16
    texts = [(normal(rng, batch, n, dim), normal(rng, batch, 20) if added else None) for n in lengths]
    image_size = (8 * height - 3, 8 * width)
    options = RestoreOptions(steps=steps, tile=tile, overlap=overlap, batch=tile_batch, sampler=sampler)
    plan = plan_sampling(options, config, height, width)
    if by_tile:
        tiles = len(plan.corners)
        texts[1] = normal(rng, batch, tiles, lengths[1], dim), normal(rng, batch, tiles, 20) if added else None

    expected = []
    for i in range(batch):  # the published loop takes one image
        item = slice(i, i + 1)
        tensors = [[None if x is None else torch.from_numpy(x[item]) for x in side] for side in texts]

        def texts_of(step, number, tensors=tensors):
            own = [x if x is None or not by_tile else x[:, number] for x in tensors[1]]
            return [tensors[0], own] if guidance > 1 else [own]

        expected.append(
            nhwc(
                denoise(
                    pair.torch_predict,
                    nchw(features[item]),
                    texts_of,
                    nchw(noise[item]),
                    steps=steps,
                    guidance=guidance,
                    rescale=rescale,
                    start=nchw(start[item]) if lr else None,
                    image_size=image_size,
                    tile=tile,
                    overlap=overlap,
                    scheduler=their_scheduler(sampler, steps, prediction=config.prediction),
                )
            )
        )

    negative, text = (Text(context=context, pooled=pooled) for context, pooled in texts)
    inputs = SamplingInputs(
        features=features,
        text=text,
        negative=negative if guidance > 1 else None,
        noise=noise,
        start=start,
        time_ids=np.array([[(*image_size, *corner, 8 * tile, 8 * tile)] for corner in plan.corners], np.float32),
        guidance=jnp.float32(guidance),
        rescale=jnp.float32(rescale) if rescale else None,
    )
    assert_parity(pair.sample(pair.parameters, plan, inputs), np.concatenate(expected))


def test_one_tile_lr_start_with_guidance(sdxl, rng):
    check_loop(sdxl, rng, size=(7, 9), steps=20)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "unipc"])
def test_samplers_of_several_steps(sdxl, rng, sampler):
    check_loop(sdxl, rng, size=(7, 9), steps=5, sampler=sampler)


def test_noise_start_without_guidance(sdxl, rng):
    check_loop(sdxl, rng, size=(8, 6), lr=False, guidance=1.0)


def test_guidance_rescaled(sdxl, rng):
    check_loop(sdxl, rng, size=(7, 9), guidance=7.5, rescale=0.7)


def test_contexts_of_different_lengths(sdxl, rng):
    check_loop(sdxl, rng, size=(6, 6), lengths=(4, 11), steps=2)


def test_several_tiles_one_at_a_time(sdxl, rng):
    check_loop(sdxl, rng, size=(13, 11), tile=8, guidance=5.0, rescale=0.5)


def test_several_tiles_together_with_a_chunk_filled_up(sdxl, rng):
    check_loop(sdxl, rng, size=(13, 21), tile=8, overlap=0.75, tile_batch=4)


def test_a_batch_of_images_in_tiles(sdxl, rng):
    check_loop(sdxl, rng, size=(12, 7), tile=8, tile_batch=2, batch=2)


@pytest.mark.parametrize(
    "given",
    [
        {"tile_batch": 4, "overlap": 0.75, "size": (13, 21)},  # the last chunk is filled up
        {"batch": 2, "tile_batch": 2, "lengths": (4, 11)},
        {"guidance": 1.0, "tile_batch": 3},
    ],
    ids=str,
)
def test_each_tile_has_a_caption_of_its_own(sdxl, rng, given):
    check_loop(sdxl, rng, **{"size": (13, 11), "tile": 8, "by_tile": True, "steps": 2, **given})


def test_sd21_has_no_added_embedding(rng):
    check_loop(Pair(unet_sd21(16), SD21), rng, size=(6, 10), added=False, steps=2)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_other_predictions(rng, prediction):
    settings = {"size": (13, 10), "tile": 8, "added": False, "guidance": 7.5, "rescale": 0.7}
    check_loop(Pair(unet_sd21(16), SD21), rng, config=PREDICTS[prediction], **settings)


def test_velocity(rng):
    latents, noise, timesteps = normal(rng, 3, 4, 5, 4), normal(rng, 3, 4, 5, 4), np.array([0, 500, 999])
    expected = DDPMScheduler(**SCHEDULE).get_velocity(nchw(latents), nchw(noise), torch.from_numpy(timesteps))
    assert_parity(schedule.target(PREDICTS["v_prediction"], latents, noise, timesteps), nhwc(expected))


@pytest.mark.parametrize("prediction", schedule.PREDICTIONS)
def test_what_is_trained_for_says_the_noise(rng, prediction):
    config = PREDICTS[prediction]
    latents, noise, timesteps = normal(rng, 3, 4, 5, 4), normal(rng, 3, 4, 5, 4), np.array([100, 500, 999])
    output = schedule.target(config, latents, noise, timesteps)
    noisy = schedule.add_noise(config, latents, noise, timesteps)
    assert_parity(schedule.to_noise(config, output, noisy, timesteps), noise)
    # Where little is left of the latents, float32 has few digits of them.
    assert_parity(schedule.to_clean(config, output, noisy, timesteps)[:2], latents[:2])


@pytest.mark.parametrize("betas", [(0.012, 0.00085), (0.02, 0.001)])
def test_falling_betas(betas):
    config = schedule.ScheduleConfig(beta_start=betas[0], beta_end=betas[1])
    settings = {**SCHEDULE, "beta_start": betas[0], "beta_end": betas[1]}
    expected = DDPMScheduler(**settings).alphas_cumprod.numpy()
    np.testing.assert_allclose(schedule.alphas_cumprod(config), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta_start": 0.0}, "beta_start is 0.0 and beta_end 0.012: must lie between 0 and 1"),
        ({"beta_end": 1.0}, "beta_start is 0.00085 and beta_end 1.0: must lie"),
        ({"prediction": "x0"}, "prediction is 'x0': must be one of epsilon, v_prediction, sample"),
    ],
)
def test_schedules_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        schedule.ScheduleConfig(**changes)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50, 999, 1000])
def test_sigmas_and_timesteps(steps):
    scheduler = euler_scheduler(steps)
    np.testing.assert_array_equal(schedule.timesteps(CONFIG, steps), scheduler.timesteps.numpy())
    np.testing.assert_allclose(schedule.sigmas(CONFIG, steps), scheduler.sigmas.numpy(), rtol=1e-5)
    np.testing.assert_allclose(
        samplers.Euler(CONFIG, steps).init_noise_scale, float(scheduler.init_noise_sigma), rtol=1e-5
    )


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}: must be between 1 and 1000"):
        schedule.timesteps(CONFIG, steps)


def test_add_noise(rng):
    latents, noise, timesteps = normal(rng, 3, 4, 5, 4), normal(rng, 3, 4, 5, 4), np.array([0, 500, 999])
    expected = DDPMScheduler(**SCHEDULE).add_noise(nchw(latents), nchw(noise), torch.from_numpy(timesteps))
    assert_parity(schedule.add_noise(CONFIG, latents, noise, timesteps), nhwc(expected))


@pytest.mark.parametrize("steps", [4, 20, 300])
def test_ddpm_is_ancestral_sampling(rng, monkeypatch, steps):
    """A toy noise predictor that both frameworks can run: what counts is the walk. Both draw the same noise."""
    x, fresh = normal(rng, 2, 4, 5, 4), normal(rng, steps, 2, 4, 5, 4)
    draws = iter(fresh)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: nchw(next(draws)))
    scheduler = DDPMScheduler(timestep_spacing="leading", clip_sample=False, **SCHEDULE)
    scheduler.set_timesteps(steps)
    expected = nchw(x)
    for t in scheduler.timesteps:
        expected = scheduler.step(torch.tanh(expected) * (1 + t / 1000), t, expected).prev_sample

    sampler = samplers.DDPM(CONFIG, steps)
    ours = sampler.sample(
        lambda x, t: jnp.tanh(x) * (1 + t / 1000), jnp.asarray(x), jnp.asarray(sampler.timesteps()), jnp.asarray(fresh)
    )
    assert_parity(ours, nhwc(expected))
    with pytest.raises(ValueError, match="step_noise is None"):
        sampler.sample(lambda x, t: x, jnp.asarray(x), jnp.asarray(sampler.timesteps()))


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_samplers_are_static_values(name):
    """Hashable, equal by what they hold, and what the protocol says: so that a plan compiles once."""
    one, same, other = (samplers.SAMPLERS[name](CONFIG, steps) for steps in (5, 5, 6))
    assert isinstance(one, Sampler)
    assert hash(one) == hash(same)
    assert one == same != other
    assert one.timesteps().shape == (5,)
    assert one.init_noise_scale >= 1
