"""Losses in pictures: through the decoder, against by-hand sums; LPIPS as the metric; guidance as what is asked for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pictures import coordinates
from training_case import BATCH, make_batch, make_step, model_config, parameters, placed, start, train_config
from training_runs import place, train

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.config import from_dict
from faithdiff_jax.diffusion import schedule
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.metrics.perceptual import lpips, lpips_distance
from faithdiff_jax.files.images import upscale
from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import unflatten
from faithdiff_jax.training import distillation
from faithdiff_jax.training.config import TrainConfig
from faithdiff_jax.training.losses import PictureLoss, mean_error, picture_loss

LAST = {
    "groups": {"rest": {"parameters": ["unet.conv_out.*"], "learning_rate": 1e-2}},
    "frozen": [
        *("alignment.*", "lq_encoder.*", "vae.*", "text_encoder*", "unet.*_embedding.*", "unet.*_blocks.*"),
        *("unet.conv_in.*", "unet.mid_block.*", "unet.conv_norm_out.*"),
    ],
}
PREDICTION = {"epsilon": {}, "sample": {"prediction": "sample"}, "v_prediction": {"prediction": "v_prediction"}}


def fed(prediction: str = "sample") -> FaithDiffConfig:
    model = model_config()
    unet = dataclasses.replace(model.unet, guidance_dim=8)
    return dataclasses.replace(
        model, unet=unet, schedule=schedule.ScheduleConfig(**PREDICTION[prediction], beta_end=0.002)
    )


def step_with(model=None, **changes):
    config = train_config(LAST, rematerialisation="none", ema=None, **changes)
    return make_step(config, model or fed())


def losses(step, batch):
    """Each sample's loss, of the parameters that a run would start from."""
    state, frozen = start(step)

    def each(trained, frozen, batch):
        return step.loss(trained, frozen, batch, step._draw(batch, jnp.int32(0)))[1]

    return np.asarray(jax.jit(each)(state["trained"], frozen, placed(batch, None)))


def decoded(step, batch):
    """What the decoder makes of the prediction, (b, H, W, 3), from the parameters that a run would start from."""
    model = step.model
    params = unflatten({path: jnp.asarray(array) for path, array in parameters(model).items()})
    vae = step.networks.vae(params["vae"])
    latents = vae.encode(batch["hq"], batch["vae_noise"])
    forward = model.schedule, latents, batch["noise"], batch["timesteps"]
    noisy = schedule.add_noise(*forward)
    texts = *step.encode_text(params, batch), batch["time_ids"]
    features = step.networks.lq_encoder(params["lq_encoder"])(batch["lq"])
    denoiser = step.networks.denoiser({"unet": params["unet"], "alignment": params["alignment"]})
    output = denoiser(noisy, batch["timesteps"], features, *texts)
    clean = schedule.to_clean(model.schedule, output, noisy, batch["timesteps"])
    return np.asarray(vae.decode(clean))


def test_mean_errors():
    ours, theirs = jnp.float32([[[[1.0], [3.0]]], [[[0.0], [0.0]]]]), jnp.zeros((2, 1, 2, 1))
    assert mean_error("l1", ours, theirs).tolist() == [2, 0]
    assert mean_error("l2", ours, theirs).tolist() == [5, 0]
    assert mean_error("l1", ours.astype(jnp.bfloat16), theirs).dtype == jnp.float32


@pytest.mark.parametrize("prediction", PREDICTION)
def test_pixels_are_those_of_the_decoded_prediction(prediction):
    model, batch = fed(prediction), placed(make_batch(0, 2), None)
    settings = {"batch": 2, "loss": "l2", "noise_offset": 0}
    latent = losses(step_with(model, **settings), batch)
    step = step_with(model, losses={"latent": 0.5, "pixel": 2.0}, **settings)
    both = losses(step, batch)

    pixel = np.mean((decoded(step, batch) - batch["hq"]) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(both, 0.5 * latent + 2.0 * pixel, rtol=1e-4)


def test_a_difference_is_added_to_the_lq_picture():
    model = dataclasses.replace(fed(), decoder_output="difference")
    step = step_with(model, losses={"latent": 0, "pixel": 1}, batch=2, noise_offset=0)
    batch = placed(make_batch(0, 2), None)
    wanted = np.mean(np.abs(batch["lq"] + decoded(step, batch) - batch["hq"]), axis=(1, 2, 3))
    np.testing.assert_allclose(losses(step, batch), wanted, rtol=1e-4)


def test_lpips_is_the_metrics(rng):
    pictures = rng.integers(0, 256, (2, 3, 64, 64, 3)).astype(np.uint8)
    signed = jnp.asarray(pictures / 127.5 - 1, jnp.float32)
    np.testing.assert_allclose(lpips_distance("alex")(*signed), lpips("alex")(*map(list, pictures)), rtol=1e-4)


def test_lpips_of_flat_pictures_has_a_slope():
    """Where no channel of a layer is active, the length of its vector is zero."""
    flat = jnp.zeros((1, 64, 64, 3))
    distance = lpips_distance("alex")
    slope = jax.grad(lambda ours: distance(ours, flat)[0])(flat + 0.1)
    assert np.isfinite(slope).all()


def test_zero_vectors_have_a_slope(monkeypatch):
    from faithdiff_jax.evaluation.metrics import perceptual

    monkeypatch.setattr(perceptual, "alexnet", lambda convolutions, x: [jax.nn.relu(x - 10)])
    distance = functools.partial(perceptual._lpips.__wrapped__, "alex", [], [jnp.ones(3)])
    slope = jax.grad(lambda ours: distance(ours, ours)[0])(jnp.zeros((1, 4, 4, 3)))
    assert np.isfinite(slope).all()


def test_lpips_counts_for_the_second_guidance_alone():
    settings = {"losses": {"latent": 0, "pixel": 1, "lpips": 10, "guidance": [1, 5]}, "batch": BATCH}
    step, batch = step_with(**settings), make_batch(0)
    drawn = step._draw(placed(batch, None), jnp.int32(3)).guidance
    assert set(drawn.tolist()) == {1.0, 5.0}
    np.testing.assert_array_equal(step._draw(placed(batch, None), jnp.int32(3)).guidance, drawn)
    # The distance stands in for LPIPS, which needs larger pictures than these.
    step.pictures = PictureLoss("l1", 1.0, 10.0, lambda ours, theirs: jnp.ones(len(ours)))
    without = step_with(losses={"latent": 0, "pixel": 1, "guidance": [1, 5]}, batch=BATCH)
    rows = {"guidance": np.float32([1, 5] * (BATCH // 2))}
    more = losses(step, batch | rows) - losses(without, batch | rows)
    np.testing.assert_allclose(more, [0, 10] * (BATCH // 2), atol=1e-4)


def test_guidance_is_fed():
    model = fed()
    step = step_with(model, losses={"pixel": 1, "guidance": [1, 5]}, batch=2)
    batch = make_batch(0, 2)
    one, other = (losses(step, batch | {"guidance": np.full(2, value, np.float32)}) for value in (1, 5))
    assert (np.abs(one - other) > 1e-4 * one).all()


def test_only_what_trains_changes():
    step = step_with(losses={"latent": 0, "pixel": 1}, batch=2)
    state, frozen = start(step)
    before = jax.device_get(state["trained"])
    state, metrics = step.run(state, frozen, placed(make_batch(0, 2), None))
    assert state["trained"].keys() == {"unet.conv_out.kernel", "unet.conv_out.bias"}
    assert all(np.abs(array - before[path]).max() > 1e-6 for path, array in state["trained"].items())
    assert metrics["gradient_norm"] > 0


def test_the_decoder_trains_where_pictures_are_compared():
    groups = {"decoder": {"parameters": ["vae.decoder.*", "vae.post_quant_conv.*"], "learning_rate": 1e-2}}
    frozen = ["alignment.*", "lq_encoder.*", "unet.*", "text_encoder*", "vae.encoder.*", "vae.quant_conv.*"]
    settings = {"groups": groups, "frozen": frozen, "batch": 2, "rematerialisation": "none", "ema": None}
    step = make_step(train_config({}, losses={"latent": 0, "pixel": 1}, **settings), fed())
    state, fixed = start(step)
    before = jax.device_get(state["trained"])
    assert {path.split(".")[1] for path in before} == {"decoder", "post_quant_conv"}
    state, _ = step.run(state, fixed, placed(make_batch(0, 2), None))
    assert all(np.abs(array - before[path]).max() > 1e-6 for path, array in state["trained"].items())


def test_a_decoder_of_differences_starts_at_none_and_is_exported(tmp_path):
    """After steps that are too small to be seen, what is restored is the enlarged input."""
    settings = {
        "steps": 2,
        "batch": 2,
        "losses": {"latent": 0, "pixel": 1},
        "model": {"decoder_output": "difference"},
        "groups": {"last": {"parameters": ["vae.decoder.conv_out.*"], "learning_rate": 1e-9}},
        "frozen": [
            *("alignment.*", "lq_encoder.*", "unet.*", "text_encoder*", "vae.encoder.*", "vae.*quant_conv.*"),
            *("vae.decoder.conv_in.*", "vae.decoder.conv_norm_out.*", "vae.decoder.*_block*"),
        ],
    }
    run = tmp_path / "run"
    assert train(place().command(run, settings), devices=1) == 0
    assert run_command("convert", ["--run", str(run), "--output", str(tmp_path / "model")]) == 0
    model, picture = FaithDiff.load(tmp_path / "model"), coordinates(8, 8)
    assert model.config.decoder_output == "difference"
    np.testing.assert_array_equal(model.restore(picture, scale=2, steps=1, color_fix="none"), upscale(picture, 2))


def test_a_decoder_that_does_not_train_cannot_change_its_output(tmp_path, capsys):
    settings = {"groups": LAST["groups"], "frozen": LAST["frozen"], "model": {"decoder_output": "difference"}}
    assert train(place().command(tmp_path / "run", {"steps": 2, "batch": 2, **settings}), devices=1) == 2
    assert "'difference': needs vae.decoder.conv_out.* in a group, to learn it" in capsys.readouterr().err


def test_nothing_is_decoded_without_need():
    assert picture_loss(train_config(LAST)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": {"latent": 0}}, "latent, pixel and lpips are all 0: one must be above"),
        ({"losses": {"pixel": -1}}, "pixel is -1"),
        ({"losses": {"lpips": float("nan")}}, "lpips is nan"),
        ({"losses": {"guidance": [5, 1]}}, r"guidance is \[5, 1\]: must be two rising numbers from 1 to 100"),
        ({"losses": {"guidance": [1, 5]}, "distill": {"method": "steps"}}, "losses.guidance is for learning from"),
    ],
)
def test_losses_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        from_dict(TrainConfig, {"steps": 1000, **LAST, **changes}, "test")


def test_guidance_needs_a_unet_that_is_fed():
    config = train_config(LAST, losses={"pixel": 1, "guidance": [1, 5]})
    with pytest.raises(InputError, match=r"needs model\.unet\.guidance_dim"):
        distillation.make_step(config, model_config(), {}, None, None, None)
