"""The training step: the same on any devices and in any rounds; what it changes, and what it leaves alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import relative_error
from training_case import (
    BATCH,
    STAGE_1,
    STAGE_2,
    Outcome,
    make_batch,
    make_mesh,
    make_step,
    model_config,
    parameters,
    placed,
    run,
    start,
    train_config,
)

from faithdiff_jax import sharding
from faithdiff_jax.diffusion import schedule
from faithdiff_jax.inference.programs import Programs
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import flatten, unflatten
from faithdiff_jax.training.groups import assign_groups
from faithdiff_jax.training.optimizer import make_optimizer
from faithdiff_jax.training.parameters import inference_params, model_shapes, not_finite
from faithdiff_jax.training.step import Draws, TrainStep, draw

STEPS = 3
# Some of every kind of layer: a stack, convolutions, norms, an attention; the rest is frozen, which compiles faster.
SOME = {
    "groups": {
        "lq_encoder": {"parameters": ["lq_encoder.mid_block.*"], "learning_rate": 1e-3},
        "rest": {
            "parameters": ["alignment.*", "unet.mid_block.attentions.*", "unet.conv_out.*"],
            "learning_rate": 2e-3,
        },
    },
    "frozen": [
        *("vae.*", "text_encoder*", "lq_encoder.conv_in.*", "lq_encoder.down_blocks.*", "unet.conv_in.*"),
        *("unet.*_embedding.*", "unet.down_blocks.*", "unet.up_blocks.*", "unet.mid_block.resnets.*"),
        "unet.conv_norm_out.*",
    ],
}
# Adam's epsilon is of the size of the gradients here: with a tiny one, a gradient that is rounding alone makes a full
# step in a random direction.
SETTINGS = {"loss": "l2", "optimizer": {"warmup": 0, "clip": 0.25, "epsilon": 1e-4}, "rematerialisation": "none"}
LIMIT = 1e-4
LATENT = (6, 10, 4)


@pytest.fixture(autouse=True, scope="module")
def _small_parameters_are_split():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "SMALLEST_SPLIT", 64)
        yield


@functools.cache
def step_on(
    devices: tuple[int, int] | None = None,
    accumulation: int = 1,
    *,
    loss: str = "l2",
    group: int | None = None,
    rematerialisation: str = "none",
) -> TrainStep:
    """A step on a (data, fsdp) mesh; with `group`, under mixing "batch" and on twice the batch."""
    batch = BATCH if group is None else 2 * BATCH
    config = train_config(
        SOME,
        **SETTINGS | {"loss": loss, "rematerialisation": rematerialisation},
        batch=batch,
        accumulation=accumulation,
    )
    model = model_config("none" if group is None else "batch", group)
    return make_step(config, model, None if devices is None else make_mesh(*devices))


@functools.cache
def after_steps(*args, **changes) -> Outcome:
    """Three steps, noise and timesteps drawn."""
    step = step_on(*args, **changes)
    return run(step, [make_batch(seed, step.config.batch, given=False) for seed in range(STEPS)])


def in_rows(losses: np.ndarray, accumulation: int, unit: int) -> np.ndarray:
    """Losses in the order of the batch's rows: a round has every so-manieth group of samples."""
    rows = np.arange(len(losses)).reshape(-1, accumulation, unit).swapaxes(0, 1).ravel()
    ordered = np.empty_like(losses)
    ordered[rows] = losses
    return ordered


def assert_same(outcome: Outcome, reference: Outcome, initial, accumulation: int, unit: int) -> None:
    for seen, expected in zip(outcome.metrics, reference.metrics, strict=True):
        np.testing.assert_array_equal(in_rows(seen["timesteps"], accumulation, unit), expected["timesteps"])
        assert relative_error(in_rows(seen["losses"], accumulation, unit), expected["losses"]) < 1e-5
        for name in ("loss", "gradient_norm", "gradient_norm/lq_encoder", "gradient_norm/rest"):
            np.testing.assert_allclose(seen[name], expected[name], rtol=1e-5)
    for part in ("trained", "ema"):
        for path, array in reference.state[part].items():
            change = array - initial[path]
            # Weight decay alone moves a bias without effect, such as an attention's of its keys.
            assert np.abs(change).max() > 1e-6, f"{path} did not change"
            error = np.abs(outcome.state[part][path] - array).max()
            rounding = STEPS * 2**-24 * max(1, np.abs(array).max())
            assert error <= LIMIT * np.abs(change).max() + rounding, (
                f"{part} {path}: {error / np.abs(change).max():.1e}"
            )
    ours, theirs = jax.tree.leaves(outcome.state["optimizer"]), jax.tree.leaves(reference.state["optimizer"])
    # Moments that are mathematically zero are rounding, of the size of the largest ones' last digits.
    floor = 1e-7 * max(np.abs(leaf).max() for leaf in theirs if np.ndim(leaf))
    for leaf, expected in zip(ours, theirs, strict=True):
        assert np.abs(leaf - expected).max() <= LIMIT * np.abs(expected).max() + floor
    for count in ("step", "skipped", "skipped_in_a_row"):
        assert outcome.state[count] == reference.state[count]


@pytest.mark.parametrize(
    ("devices", "accumulation", "changes"),
    [
        (None, 4, {}),
        pytest.param((1, 2), 4, {}, marks=pytest.mark.slow),
        ((2, 2), 2, {}),
        pytest.param((8, 1), 1, {}, marks=pytest.mark.slow),
        ((2, 4), 1, {"rematerialisation": "full"}),
    ],
    ids=str,
)
def test_devices_and_rounds_change_nothing(devices, accumulation, changes):
    outcome = after_steps(devices, accumulation, **changes)
    assert_same(outcome, after_steps(), parameters(model_config()), accumulation, 1)


@pytest.mark.parametrize(
    ("devices", "accumulation"), [((2, 4), 1), pytest.param((1, 2), 4, marks=pytest.mark.slow)], ids=str
)
def test_devices_and_rounds_change_nothing_where_samples_are_mixed(devices, accumulation):
    group = 2
    reference = after_steps(group=group)
    outcome = after_steps(devices, accumulation, group=group)
    assert_same(outcome, reference, parameters(model_config()), accumulation, group)


@pytest.mark.slow
def test_devices_change_nothing_under_the_published_loss():
    """L1's gradient jumps where an error is zero; in this batch all are clear of that."""
    outcome = after_steps((2, 4), 1, loss="l1")
    assert_same(outcome, after_steps(loss="l1"), parameters(model_config()), 1, 1)


def test_groups_of_samples_matter():
    """Mixed and not, the same samples have other losses: the test above would see a group torn apart."""
    mixed, plain = after_steps(group=2).losses[0], after_steps().losses[0]
    assert mixed.shape == (2 * BATCH,)
    assert plain.shape == (BATCH,)
    step = step_on(group=2)
    batch, other = make_batch(0, 2 * BATCH, given=False), make_batch(1, 2 * BATCH, given=False)
    # The second sample of the first group is exchanged; the first sample and the other groups stay.
    changed = {name: np.concatenate([array[:1], other[name][1:2], array[2:]]) for name, array in batch.items()}
    again = run(step, [changed]).losses[0]
    assert abs(again[0] - mixed[0]) > 1e-5
    np.testing.assert_allclose(again[2:], mixed[2:], rtol=1e-6)


def test_parameters_and_state_are_split_and_stay_so():
    step = step_on((2, 4), 1, rematerialisation="full")
    state, frozen = start(step)
    split = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    assert len(split) > 0.5 * len([leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 1])
    assert all(leaf.addressable_shards[0].data.size * 4 == leaf.size for leaf in split)
    assert any(not leaf.sharding.is_fully_replicated for leaf in frozen.values())
    for part in ("trained", "ema"):
        assert any(not leaf.sharding.is_fully_replicated for leaf in state[part].values())
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    for seed in range(STEPS):
        state, _ = step.run(state, frozen, placed(make_batch(seed, given=False), step.mesh))
        same = jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), state, places)
        assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(("devices", "accumulation"), [(None, 4), ((2, 2), 2)], ids=str)
def test_one_program_for_all_steps(devices, accumulation):
    """These steps are run by nothing else here: three batches, one compilation."""
    assert len(after_steps(devices, accumulation).metrics) == STEPS
    assert after_steps(devices, accumulation).compiled == 1


@pytest.mark.parametrize("devices", [None, (2, 4)], ids=str)
def test_the_states_memory_is_used_again(devices):
    step = step_on() if devices is None else step_on(devices, 1, rematerialisation="full")
    state, frozen = start(step)
    old = jax.tree.leaves(state)
    step.run(state, frozen, placed(make_batch(0, given=False), step.mesh))
    assert all(leaf.is_deleted() for leaf in old)
    assert not any(leaf.is_deleted() for leaf in frozen.values())


def test_what_is_frozen_stays_and_is_in_no_state():
    step = step_on()
    state, frozen = start(step)
    assert state.keys() == {"step", "trained", "ema", "optimizer", "skipped", "skipped_in_a_row"}
    assert state["trained"].keys() == state["ema"].keys() == set(step.labels)
    assert not state["trained"].keys() & frozen.keys()
    size = sum(leaf.size for leaf in state["trained"].values())
    assert sum(leaf.size for leaf in jax.tree.leaves(state["optimizer"]) if leaf.ndim) == 2 * size
    assert all(leaf.size == 1 for leaf in jax.tree.leaves(state["optimizer"]) if not leaf.ndim)
    for seed in range(2):
        state, _ = step.run(state, frozen, placed(make_batch(seed, given=False), None))
    for path, array in frozen.items():
        np.testing.assert_array_equal(array, parameters(step.model)[path])
    for path, array in state["trained"].items():
        assert array.dtype == jnp.float32
        assert not np.array_equal(array, parameters(step.model)[path]), path


def test_stage_1_costs_a_fraction_of_stage_2():
    """At full size, by shapes alone: masters, average and two moments of the aligner against those of everything."""
    shapes = model_shapes(FaithDiffConfig())
    size = {}
    for stage in (STAGE_1, STAGE_2):
        config = train_config(stage)
        labels = assign_groups(config, shapes)
        trained = {path: jax.ShapeDtypeStruct(shapes[path], jnp.float32) for path in labels}
        moments = jax.eval_shape(make_optimizer(config, labels).init, trained)
        leaves = jax.tree.leaves((trained, trained, moments))
        size[len(labels)] = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    one, two = size.values()
    assert two == pytest.approx(16 * 2612.2e6, rel=1e-3)
    assert one < 0.005 * two


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_is_left_out(bad):
    step = step_on()
    state, frozen = start(step)
    state, _ = step.run(state, frozen, placed(make_batch(0, given=False), None))
    before = jax.device_get(state)
    broken = make_batch(1, given=False)
    broken["lq"][2, 3, 4, 1] = bad
    for times in (1, 2):
        state, metrics = step.run(state, frozen, placed(broken, None))
        assert not np.isfinite(metrics["loss"])
        assert np.isfinite(np.delete(metrics["losses"], 2)).all(), "only the sample that is broken is"
        assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (times, times)
        after = jax.device_get(state)
        assert after["step"] == 1 + times
        for part in ("trained", "ema", "optimizer"):
            jax.tree.map(np.testing.assert_array_equal, after[part], before[part])
    state, metrics = step.run(state, frozen, placed(make_batch(1, given=False), None))
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (2, 0)
    # The schedule counts the steps that were applied, here the second.
    assert metrics["learning_rate/rest"] == after_steps().metrics[1]["learning_rate/rest"]
    state = jax.device_get(state)
    assert (state["skipped"], state["skipped_in_a_row"], state["step"]) == (2, 0, 4)
    for part in ("trained", "ema"):
        for path, array in state[part].items():
            assert np.isfinite(array).all()
            assert not np.array_equal(array, before[part][path])


def test_what_is_not_finite_is_named():
    good = {"a": jnp.ones(3), "count": jnp.int32(1), "b": jnp.ones((2, 2), jnp.bfloat16)}
    assert not_finite(good) == not_finite({}) == ""
    assert not_finite(good | {"c": jnp.array([1, jnp.nan]), "d": jnp.array([-jnp.inf])}) == "c, d"
    assert not_finite({str(i): jnp.array(jnp.nan) for i in range(9)}) == "0, 1, 2, 3, 4 and 4 more"


def test_the_average_follows():
    step = step_on()
    state, frozen = start(step)
    jax.tree.map(np.testing.assert_array_equal, state["ema"], state["trained"])
    for number in range(STEPS):
        before = jax.device_get(state["ema"])
        state, _ = step.run(state, frozen, placed(make_batch(number, given=False), None))
        decay = (1 + number) / (10 + number)
        for path, new in jax.device_get(state["trained"]).items():
            expected = decay * before[path].astype(np.float64) + (1 - decay) * new
            np.testing.assert_allclose(state["ema"][path], expected, rtol=0, atol=3e-7 * max(1, np.abs(new).max()))


def test_bfloat16_computes_close_to_float32():
    """Within 2 % in every sample's loss and 5 % in the gradient's norm, bfloat16 having eight bits; masters float32."""
    settings = SETTINGS | {"dtype": "bfloat16"}
    step = make_step(train_config(STAGE_1, **settings), model_config())
    plain = make_step(train_config(STAGE_1, **SETTINGS), model_config())
    batches = [make_batch(0)]
    outcome, reference = run(step, batches), run(plain, batches)
    np.testing.assert_allclose(outcome.losses[0], reference.losses[0], rtol=0.02)
    norms = [o.metrics[0]["gradient_norm"] for o in (outcome, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
    assert outcome.losses[0].dtype == np.float32
    assert not np.array_equal(outcome.losses[0], reference.losses[0])
    leaves = [leaf for leaf in jax.tree.leaves(outcome.state) if np.ndim(leaf)]
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
    # Scales near one change by less than bfloat16 could hold.
    initial = parameters(step.model)
    scales = {path: array for path, array in outcome.state["trained"].items() if path.endswith("ln_1.scale")}
    assert scales
    for path, array in scales.items():
        assert 0 < np.abs(array - initial[path]).max() < 2**-8

    _, frozen = start(step)
    assert {leaf.dtype for leaf in frozen.values()} == {jnp.dtype(jnp.bfloat16)}
    whole = flatten(inference_params(step.config, outcome.state, frozen))
    assert whole.keys() == model_shapes(step.model).keys()
    path = "alignment.spatial_ch_projs.kernel"
    np.testing.assert_array_equal(whole[path], outcome.state["ema"][path].astype(jnp.bfloat16))


def drawn(seed=0, step=0, rows=(0,), shape=LATENT, offset=0.02) -> Draws:
    def values(step, rows):
        draws = draw(seed, step, rows, shape, 1000, offset)
        return draws.timesteps, draws.noise, draws.vae_noise

    return Draws(*jax.jit(values)(jnp.int32(step), jnp.asarray(rows, jnp.int32)))


def test_timesteps_are_even():
    """Over 0..999: every tenth of the range within five standard deviations, both ends reached."""
    timesteps = np.asarray(drawn(rows=range(50_000), shape=(1, 1, 1)).timesteps)
    assert timesteps.dtype == np.int32
    assert (timesteps.min(), timesteps.max()) == (0, 999)
    counts = np.bincount(timesteps // 100, minlength=10)
    assert np.abs(counts - 5000).max() < 5 * (5000 * 0.9) ** 0.5
    low = np.bincount(timesteps % 10, minlength=10)
    assert np.abs(low - 5000).max() < 5 * (5000 * 0.9) ** 0.5


def test_noise_is_standard_normal_with_an_offset_shared_over_space():
    rows, shape = range(2000), (6, 5, 4)
    plain = np.asarray(drawn(rows=rows, shape=shape, offset=0.0).noise, np.float64)
    with_offset = np.asarray(drawn(rows=rows, shape=shape, offset=0.02).noise, np.float64)
    offsets = with_offset - plain
    assert np.ptp(offsets, axis=(1, 2)).max() < 1e-6
    offsets = offsets.mean(axis=(1, 2))  # (2000, 4): one for each sample and channel
    assert np.isclose(offsets.std(), 0.02, rtol=5 / (2 * offsets.size) ** 0.5)
    assert abs(offsets.mean()) < 5 * 0.02 / offsets.size**0.5
    assert np.abs(np.corrcoef(offsets.T) - np.eye(4)).max() < 5 / 2000**0.5
    assert np.isclose(plain.var(), 1, rtol=5 * (2 / plain.size) ** 0.5)
    assert np.isclose(np.asarray(drawn(rows=rows, shape=shape, offset=0.5).noise).var(), 1 + 0.5**2, rtol=0.02)
    vae_noise = np.asarray(drawn(rows=rows, shape=shape).vae_noise)
    assert np.isclose(vae_noise.var(), 1, rtol=5 * (2 / vae_noise.size) ** 0.5)
    assert abs(np.corrcoef(vae_noise.ravel(), plain.ravel())[0, 1]) < 5 / plain.size**0.5


def test_draws_are_of_seed_step_and_row_alone():
    one = drawn(seed=3, step=5, rows=[7])
    among = drawn(seed=3, step=5, rows=[1, 7, 2])
    for name in ("timesteps", "noise", "vae_noise"):
        np.testing.assert_array_equal(getattr(one, name)[0], getattr(among, name)[1])
    others = [drawn(seed=4, step=5, rows=[7]), drawn(seed=3, step=6, rows=[7]), drawn(seed=3, step=5, rows=[8])]
    for other in others:
        for name in ("noise", "vae_noise"):
            values = np.asarray(getattr(one, name)), np.asarray(getattr(other, name))
            assert np.abs(values[0] - values[1]).max() > 0.5
        assert other.timesteps[0] != one.timesteps[0]


def test_the_step_uses_its_draws_and_those_that_are_given():
    """Losses of a step that draws, against the loss on what `draw` gives for the seed, the step and the rows."""
    step = step_on()
    state, frozen = start(step)
    batch = placed(make_batch(0, given=False), None)
    loss = jax.jit(lambda trained, *draws: step.loss(trained, frozen, batch, Draws(*draws))[1])
    for number in range(2):
        draws = drawn(seed=step.config.seed, step=number, rows=batch["row"])
        expected = loss(state["trained"], draws.timesteps, draws.noise, draws.vae_noise)
        state, metrics = step.run(state, frozen, batch)
        np.testing.assert_array_equal(metrics["timesteps"], draws.timesteps)
        np.testing.assert_allclose(metrics["losses"], expected, rtol=1e-5)
    rows = batch | {"row": batch["row"] + 8}
    state, metrics = step.run(state, frozen, rows)
    expected = drawn(seed=step.config.seed, step=2, rows=rows["row"]).timesteps
    np.testing.assert_array_equal(metrics["timesteps"], expected)
    given = make_batch(0)
    used = step._draw({name: jnp.asarray(array) for name, array in given.items()}, jnp.int32(0))
    for name in ("timesteps", "noise", "vae_noise"):
        np.testing.assert_array_equal(getattr(used, name), given[name])


def test_counting_goes_without_repeats():
    plain = step_on((2, 4), 1, rematerialisation="full").without_rematerialisation()
    assert (plain.config.rematerialisation, plain.config.accumulation, plain.mesh) == ("none", 1, None)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_other_predictions(prediction):
    """The loss is on what the UNet puts out, read back here from the noise that `predict_noise` says it means."""
    config = train_config(SOME, **SETTINGS)
    model = model_config()
    model = dataclasses.replace(model, schedule=dataclasses.replace(model.schedule, prediction=prediction))
    batch, arrays = make_batch(0), dict(parameters(model))
    given = Draws(*(jnp.asarray(batch[name]) for name in ("timesteps", "noise", "vae_noise")))
    step = make_step(config, model)
    draws = given.timesteps, given.noise, given.vae_noise
    loss, _ = jax.jit(lambda arrays, batch, *draws: step.loss({}, arrays, batch, Draws(*draws)))(arrays, batch, *draws)

    programs, parts = Programs(model), unflatten(arrays)
    latents = programs.draw(parts["vae"], programs.moments(parts["vae"], batch["hq"]), given.vae_noise)
    alpha = schedule.alphas_cumprod(model.schedule)[given.timesteps].reshape(-1, 1, 1, 1)
    noisy = np.sqrt(alpha) * latents + np.sqrt(1 - alpha) * given.noise
    encoders = [parts["text_encoder"], parts["text_encoder_2"]]
    text = programs.encode_text(encoders, [batch["token_ids_0"], batch["token_ids_1"]])
    features = programs.encode_lq(parts["lq_encoder"], batch["lq"])
    denoiser = {"unet": parts["unet"], "alignment": parts["alignment"]}
    noise = programs.predict_noise(denoiser, noisy, given.timesteps, features, *text, batch["time_ids"])
    # x0 = (x - sqrt(1 - a) noise) / sqrt(a), v = sqrt(a) noise - sqrt(1 - a) x0
    if prediction == "sample":
        output, target = (noisy - np.sqrt(1 - alpha) * noise) / np.sqrt(alpha), latents
    else:
        output = (noise - np.sqrt(1 - alpha) * noisy) / np.sqrt(alpha)
        target = np.sqrt(alpha) * given.noise - np.sqrt(1 - alpha) * latents
    np.testing.assert_allclose(loss, np.mean((output - target) ** 2), rtol=1e-4)
