"""Distillation: the teacher's targets, the student's start, what trains, runs that resume, and what is exported."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import EulerDiscreteScheduler
from parity import assert_parity
from training_case import SIZE, make_batch, parameters, placed, train_config
from training_runs import MODEL, assert_same_bits

from faithdiff_jax.diffusion import samplers, schedule
from faithdiff_jax.diffusion.schedule import ScheduleConfig
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.models.parts import unflatten
from faithdiff_jax.training.distillation import DistillStep, Teacher
from faithdiff_jax.training.groups import assign_groups
from faithdiff_jax.training.parameters import TEACHER, model_shapes, trained_shapes

LATENT = (SIZE[0] // 2, SIZE[1] // 2, 4)
NEGATIVE = tuple(make_batch(9, 1)[f"token_ids_{i}"] for i in range(2))
# Some of the aligner and of the UNet, the last layers: the rest is frozen, which compiles faster.
SOME = {
    "groups": {"all": {"parameters": ["alignment.spatial_ch_projs.*", "unet.conv_out.*"], "learning_rate": 1e-2}},
    "frozen": [
        *("vae.*", "text_encoder*", "lq_encoder.*", "alignment.condition_embedding.*", "alignment.blocks.*"),
        *("unet.conv_in.*", "unet.*_embedding.*", "unet.*_block*", "unet.conv_norm_out.*"),
    ],
}
LORA = {
    "groups": {},
    "frozen": ["vae.*", "text_encoder*", "lq_encoder.*", "alignment.*", "unet.*"],
    "lora": {"parameters": ["unet.mid_block.attentions.*.to_q.kernel"], "rank": 2},
}
PLAIN = {"noise_offset": 0, "rematerialisation": "none", "loss": "l2"}


def make_step(distill: dict, stage: dict = SOME, *, teacher: dict | None = None, model: dict | None = None):
    """A step on one device, its teacher of the same numbers."""
    theirs = MODEL
    ours = MODEL
    for part, changes in (model or {}).items():
        changed = type(getattr(ours, part))(**{**vars(getattr(ours, part)), **changes})
        ours = type(ours)(**{**vars(ours), part: changed})
    config = train_config(stage, **PLAIN, distill=distill, model=model or {}, batch=2)
    options = RestoreOptions(**{"steps": 3, "guidance": 3.0, **(teacher or {})})
    labels = assign_groups(config, model_shapes(ours))
    return DistillStep(config, ours, labels, None, Teacher(theirs, options, NEGATIVE))


def arrays_of(step: DistillStep, noise: float = 0.0):
    """(trained, frozen): the student's as the teacher's but for noise, what the teacher lacks zero."""
    known = parameters(step.teacher.model)
    shapes = model_shapes(step.model)
    rng = np.random.default_rng(1)
    trained = {
        path: jnp.asarray(known.get(path, np.zeros(shape, np.float32)))
        + noise * rng.standard_normal(shape, np.float32) * path.endswith((".kernel", ".a"))
        for path, shape in trained_shapes(step.config, shapes, step.labels).items()
    }
    frozen = {
        path: jnp.asarray(known.get(path.removeprefix(TEACHER), np.zeros(shape, np.float32)))
        for path, shape in step.frozen_shapes(shapes).items()
    }
    return trained, frozen


def draws_of(step: DistillStep, batch: dict):
    return step._draw(placed(batch, None), jnp.int32(0))


@functools.cache
def batch_of(seed: int = 0):
    return make_batch(seed, 2)


def losses(step: DistillStep, batch: dict | None = None) -> np.ndarray:
    """Of a student that starts as its teacher."""
    given = batch or batch_of()

    def each(trained, frozen):
        return step.loss(trained, frozen, placed(given, None), draws_of(step, given))[1]

    return np.asarray(jax.jit(each)(*arrays_of(step)))


def test_trailing_steps_are_those_of_diffusers():
    config = ScheduleConfig(spacing="trailing")
    for steps in (1, 2, 3, 4, 20):
        theirs = EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
        )
        theirs.set_timesteps(steps)
        assert schedule.timesteps(config, steps).tolist() == theirs.timesteps.tolist()
        np.testing.assert_allclose(schedule.sigmas(config, steps), theirs.sigmas.numpy(), rtol=1e-5)
    with pytest.raises(ValueError, match="spacing is 'even': must be one of leading, trailing"):
        ScheduleConfig(spacing="even")


@functools.cache
def restorer() -> tuple[FaithDiff, list]:
    """The teacher's pieces as they are public, and the batch's captions and negative caption through its encoders."""
    model = MODEL
    params = unflatten({path: parameters(model)[path] for path in model_shapes(model)})
    whole = FaithDiff(model, params)
    encoders = [params[name] for name in ("text_encoder", "text_encoder_2")]
    ids = [batch_of()[f"token_ids_{i}"] for i in range(2)], [np.repeat(ids, 2, axis=0) for ids in NEGATIVE]
    return whole, [whole.programs.encode_text(encoders, both) for both in ids]


def test_the_teachers_targets_are_its_samplers(monkeypatch):
    step = make_step({"method": "steps", "steps": 1}, teacher={"guidance_rescale": 0.5})
    batch, restored, seen = batch_of(), step.restored, {}

    def note(denoiser, encoded, start, noise, *, of_teacher):
        found = restored(denoiser, encoded, start, noise, of_teacher=of_teacher)
        seen[of_teacher] = (encoded.features, start, found)
        return found

    def targets(trained, frozen):
        step.loss(trained, frozen, placed(batch, None), draws_of(step, batch))
        return seen[True]

    monkeypatch.setattr(step, "restored", note)
    features, start, target = jax.jit(targets)(*arrays_of(step, noise=0.1))

    # The public pieces, and Euler's steps written out.
    whole, texts = restorer()
    assert_parity(features, whole.encode_lq(batch["lq"]))
    assert_parity(start, whole.encode(batch["lq"], batch["vae_noise"]))
    given = step.teacher.model.schedule
    ids = np.tile(np.float32([*SIZE, 0, 0, 256, 256]), (2, 1))
    sigmas = schedule.sigmas(given, 3)
    x = schedule.add_noise(given, start, batch["noise"] * np.hypot(sigmas[0], 1), 999)
    for timestep, sigma, below in zip(schedule.timesteps(given, 3), sigmas[:-1], sigmas[1:], strict=True):
        conditional, unconditional = (
            whole.predict_noise(x / np.hypot(sigma, 1), np.full(2, timestep), features, *text, ids) for text in texts
        )
        x = x + (below - sigma) * samplers.guide(unconditional, conditional, 3.0, 0.5)
    assert_parity(target, x)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    for distill in ({"method": "steps", "steps": 3}, {"method": "guidance"}):
        assert losses(make_step(distill, teacher={"guidance": 1.0})).tolist() == [0, 0]


def test_one_prediction_learns_what_two_of_the_teacher_make():
    """The weight is fed through a projection that is zero at first."""
    fed = {"unet": {"guidance_dim": 8}}
    step = make_step({"method": "guidance", "guidance_range": [1, 8]}, model=fed)
    weights = np.float32([1.5, 6.0])
    batch = batch_of() | {"guidance": weights}
    whole, texts = restorer()
    latents = whole.encode(batch["hq"], batch["vae_noise"])
    noisy = schedule.add_noise(step.model.schedule, latents, batch["noise"], batch["timesteps"])
    features = whole.encode_lq(batch["lq"])
    conditional, unconditional = (
        whole.predict_noise(noisy, batch["timesteps"], features, *text, batch["time_ids"]) for text in texts
    )
    by = weights[:, None, None, None]
    expected = np.mean((conditional - (unconditional + by * (conditional - unconditional))) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(losses(step, batch=batch), expected, rtol=1e-3)
    drawn = draws_of(step, batch_of(1)).guidance
    assert ((drawn >= 1) & (drawn <= 8)).all()
    assert drawn[0] != drawn[1]


def test_only_what_the_configuration_trains_changes():
    step = make_step({"method": "steps", "steps": 2}, model={"schedule": {"spacing": "trailing"}})
    trained, frozen = arrays_of(step, noise=0.1)
    before = jax.device_get(trained)
    state, metrics = step.run(jax.jit(step.init)(trained), frozen, placed(make_batch(0, 2, given=False), None))
    assert metrics["loss"] > 0
    after = jax.device_get(state["trained"])
    assert after.keys() == step.labels.keys()
    assert not [path for path in after if np.array_equal(after[path], before[path])]
    # The teacher is there as it was, with its own copy of what trains; under LoRA both have the same kernels.
    assert {path for path in frozen if path.startswith(TEACHER)} == {f"{TEACHER}{path}" for path in step.labels}
    assert_same_bits(
        {path: np.asarray(array) for path, array in frozen.items()},
        {path: parameters(MODEL)[path.removeprefix(TEACHER)] for path in frozen},
    )
    adapted = make_step({"method": "steps"}, LORA)
    assert adapted.frozen_shapes(model_shapes(MODEL)) == model_shapes(MODEL)
