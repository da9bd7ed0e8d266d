"""AdamW, clipping, schedules and the moving average, against torch's on the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers.optimization import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup
from training_case import train_config

from faithdiff_jax.errors import InputError
from faithdiff_jax.training.config import EMAConfig
from faithdiff_jax.training.optimizer import all_groups, group_norms, learning_rate, make_optimizer, update_average

STEPS = 12
SHAPES = {"unet.a": (7, 5), "unet.b": (3,), "alignment.c": (4, 2, 2), "lq_encoder.d": (6,)}
LABELS = {"unet.a": "rest", "unet.b": "rest", "alignment.c": "rest", "lq_encoder.d": "slow"}


def config(**optimizer):
    groups = {
        "slow": {"parameters": ["lq_encoder.*"], "learning_rate": 5e-3, "weight_decay": 0.5},
        "rest": {"parameters": ["unet.*", "alignment.*"], "learning_rate": 2e-2},
    }
    return train_config({"groups": groups}, steps=STEPS, optimizer=optimizer)


def gradients(rng: np.random.Generator, size: float) -> dict[str, np.ndarray]:
    """Of all magnitudes, down to where Adam's epsilon matters and to exact zeros."""
    arrays = {}
    for path, shape in SHAPES.items():
        values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-12, 0, shape) * size
        arrays[path] = np.where(rng.uniform(size=shape) < 0.1, 0, values).astype(np.float32)
    return arrays


def of_torch(settings, initial, sequence) -> list[dict[str, np.ndarray]]:
    """The parameters after each step, in float64."""
    parameters = {path: torch.nn.Parameter(torch.from_numpy(array).double()) for path, array in initial.items()}
    groups = [
        {
            "params": [parameters[path] for path in SHAPES if LABELS[path] == name],
            "lr": group.learning_rate,
            "weight_decay": group.weight_decay,
        }
        for name, group in settings.groups.items()
    ]
    values = settings.optimizer
    optimizer = torch.optim.AdamW(groups, betas=(values.beta1, values.beta2), eps=values.epsilon)
    if values.schedule == "constant":
        schedule = get_constant_schedule_with_warmup(optimizer, values.warmup)
    else:
        schedule = get_cosine_schedule_with_warmup(optimizer, values.warmup, settings.steps)
    seen = []
    for arrays in sequence:
        for path, array in arrays.items():
            parameters[path].grad = torch.from_numpy(array).double()
        if values.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), values.clip)
        rates = {name: entry["lr"] for name, entry in zip(settings.groups, optimizer.param_groups, strict=True)}
        optimizer.step()
        schedule.step()
        seen.append((rates, {path: parameter.detach().numpy().copy() for path, parameter in parameters.items()}))
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        {"warmup": 0},
        {"warmup": 2, "clip": 0.3},
        {"warmup": 3, "schedule": "constant", "clip": None},
        {"warmup": 0, "schedule": "constant", "beta1": 0.5, "beta2": 0.9, "epsilon": 1e-4},
    ],
    ids=str,
)
def test_the_same_parameters_as_torch_to_the_last_step(settings):
    """Every element at 1e-5 of its tensor's largest change, the smallest gradients included."""
    settings = config(**settings)
    rng = np.random.default_rng(0)
    initial = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in SHAPES.items()}
    # Sizes on both sides of the clip.
    sequence = [gradients(rng, size) for size in (1, 30, 0.1, 3, 1e-3, 1, 1, 10, 1, 1, 1, 1)]
    transformation = make_optimizer(settings, LABELS)
    update = jax.jit(transformation.update)
    trained, state = initial, jax.jit(transformation.init)(initial)
    for step, (arrays, (rates, expected)) in enumerate(
        zip(sequence, of_torch(settings, initial, sequence), strict=True)
    ):
        updates, state = update(arrays, state, trained)
        trained = optax.apply_updates(trained, updates)
        for name, group in all_groups(settings).items():
            np.testing.assert_allclose(learning_rate(settings, group)(step), rates[name], rtol=2e-6, atol=1e-9)
        for path in SHAPES:
            change = expected[path] - initial[path]
            error = np.abs(np.asarray(trained[path], np.float64) - expected[path]).max()
            # Parameters themselves are rounded once a step.
            assert error <= 1e-5 * np.abs(change).max() + 2e-7 * (step + 1), f"{path}, step {step}"
    norms = [float(optax.tree.norm(arrays)) for arrays in sequence]
    assert settings.optimizer.clip is None or min(norms) < settings.optimizer.clip < max(norms)


def test_rates_begin_and_end_as_said():
    settings = config(warmup=4)
    rates = [float(learning_rate(settings, settings.groups["rest"])(step)) for step in range(STEPS + 1)]
    np.testing.assert_allclose(
        rates[:6], 2e-2 * np.array([0, 1 / 4, 2 / 4, 3 / 4, 1, (1 + np.cos(np.pi / 8)) / 2]), 1e-6
    )
    assert rates[STEPS] == pytest.approx(0, abs=1e-9)
    settings = config(warmup=4, schedule="constant")
    rates = [float(learning_rate(settings, settings.groups["slow"])(step)) for step in range(40)]
    np.testing.assert_allclose(rates[:5], 5e-3 * np.arange(5) / 4, 1e-6)
    assert len(set(rates[4:])) == 1
    assert float(learning_rate(config(warmup=0), settings.groups["slow"])(0)) == pytest.approx(5e-3)


def test_moments_are_kept_in_the_dtype_asked_for_and_for_trained_parameters_alone():
    for dtype in ("float32", "bfloat16"):
        settings = config(warmup=0, momentum_dtype=dtype)
        trained = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
        state = make_optimizer(settings, LABELS).init(trained)
        leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
        assert sum(leaf.size for leaf in leaves) == 2 * sum(leaf.size for leaf in trained.values())
        assert sorted({str(leaf.dtype) for leaf in leaves}) == sorted({dtype, "float32"})


def test_the_norm_of_each_group():
    arrays = {"unet.a": jnp.array([3.0]), "alignment.c": jnp.array([[4.0]]), "lq_encoder.d": jnp.array([2.0, -1.0])}
    norms = group_norms(arrays, LABELS)
    assert {name: float(value) for name, value in norms.items()} == pytest.approx({"rest": 5, "slow": 5**0.5})


def averaged(config: EMAConfig, values: np.ndarray) -> list[np.ndarray]:
    """The average of each step's values, the first of which it begins with; a NaN's step is not finite."""
    update = jax.jit(update_average, static_argnums=0)
    average, seen = {"x": jnp.asarray(values[0])}, []
    for step, new in enumerate(values):
        average = update(config, average, {"x": new}, jnp.int32(step), jnp.isfinite(new).all())
        seen.append(np.asarray(average["x"]))
    return seen


def test_the_moving_average():
    """decay = min(decay, (1 + s) / (10 + s)): 0.1 at first, so that what the run began with is soon forgotten."""
    values = np.random.default_rng(0).standard_normal((400, 5)).astype(np.float32)
    expected = values[0].astype(np.float64)
    for step, new in enumerate(values):
        decay = min(0.95, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * new
    np.testing.assert_allclose(averaged(EMAConfig(decay=0.95), values)[-1], expected, atol=1e-6)
    first = averaged(EMAConfig(decay=0.9999), np.array([[2.0]], np.float32))
    assert first == [2.0]


def test_the_moving_average_of_every_fourth_step():
    values = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)
    values[27] = np.nan  # step 28 is left out, and the next average is that of step 32
    seen = averaged(EMAConfig(decay=0.9, every=4), values)
    expected = values[0].astype(np.float64)
    for step, new in enumerate(values):
        if step % 4 == 3 and step != 27:
            decay = min(0.9, (1 + step) / (10 + step)) ** 4
            expected = decay * expected + (1 - decay) * new
        np.testing.assert_allclose(seen[step], expected, atol=1e-6)


def test_however_often_the_average_is_taken_it_remembers_as_long():
    values = np.repeat(np.array([0, 1], np.float32), [200, 10])[:, None]
    for every in (1, 5):
        average = averaged(EMAConfig(decay=0.9, every=every), values)[-1]
        assert average == pytest.approx(1 - 0.9**10, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": STEPS}, "optimizer.warmup is 12: must be below steps, 12"),
        ({"clip": 0}, "optimizer.clip is 0.0: must be above 0 and at most 1000000000, or null"),
        ({"beta2": 1}, "optimizer.beta2 is 1.0: must be at least 0 and below 1"),
        ({"schedule": "linear"}, "schedule is 'linear': must be one of cosine, constant"),
        ({"momentum_dtype": "int4"}, "momentum_dtype is 'int4': must be one of float32, bfloat16, int8"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        config(**settings)
