"""Adam's moments in 8 bits: what is lost of them, what they take, where they lie, and that a run resumes with them."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from training_case import STAGE_2, make_mesh, make_step, model_config, parameters, train_config
from training_runs import STAGE_1, assert_same_bits, kept_programs, place, saved, stop_at, train

from faithdiff_jax import sharding
from faithdiff_jax.training import eight_bit
from faithdiff_jax.training.checkpoints import Checkpoints
from faithdiff_jax.training.config import CheckpointConfig
from faithdiff_jax.training.eight_bit import (
    block_axis,
    from_8_bits,
    is_eight_bit,
    random_bits,
    scale_by_adam_in_8_bits,
    to_8_bits,
)

BETAS = 0.9, 0.999, 1e-8
CONFIG = train_config(STAGE_2, optimizer={"warmup": 0, "momentum_dtype": "int8"})
SHAPES = [(64, 64), (3, 3, 64, 128), (5, 128, 64), (1280, 70), (7, 640, 3)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that the arrays of tiny models have."""
    monkeypatch.setattr(eight_bit, "BLOCK", 8)
    monkeypatch.setattr(eight_bit, "SMALLEST", 64)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_value_becomes_one_of_the_levels_around_it(shape, signed):
    rng = np.random.default_rng(0)
    array = (rng.standard_normal(shape) * 10 ** rng.uniform(-4, 4, shape)).astype(np.float32)
    array[rng.uniform(size=shape) < 0.1] = 0
    array = array if signed else np.abs(array)
    held = to_8_bits(jnp.asarray(array), jnp.asarray(rng.integers(2**16, size=shape), jnp.uint32), signed=signed)
    assert held.levels.shape == shape
    assert held.levels.dtype == (jnp.int8 if signed else jnp.uint8)
    axis = block_axis(shape)
    assert held.scales.shape == (*shape[:axis], shape[axis] // 64, *shape[axis + 1 :])
    back = np.asarray(from_8_bits(held))
    largest = np.repeat(np.asarray(held.scales), 64, axis)
    assert (np.abs(array) <= largest).all()
    power, most = (3, 127) if signed else (6, 255)
    away = most * ((np.abs(back) / largest) ** (1 / power) - (np.abs(array) / largest) ** (1 / power))
    assert np.abs(away).max() <= 1 + 1e-3
    assert away.min() < -0.9
    assert away.max() > 0.9
    assert (np.sign(back[back != 0]) == np.sign(array[back != 0])).all()
    assert (back[array == 0] == 0).all()
    assert signed or (back[array > 0] > 0).all()


@pytest.mark.parametrize("signed", [True, False])
def test_it_is_right_on_average(signed):
    """4,096 roundings of each value have its mean to 5 % of a level's width, and those of two steps differ."""
    values = np.concatenate([[1.0], np.random.default_rng(0).uniform(0.01, 1, 63)]).astype(np.float32)
    array = jnp.asarray(np.repeat(values[:, None], 4096, 1))

    @jax.jit
    def back(step):
        return from_8_bits(to_8_bits(array, random_bits(array.shape, step, 3) >> 16, signed=signed))

    power, most = (3, 127) if signed else (6, 255)
    width = values * power / (most * values ** (1 / power))
    first, second = (np.asarray(back(jnp.int32(step)), np.float64) for step in (1, 2))
    assert (np.abs(first.mean(1) - values) < 0.05 * width).all()
    assert 0.2 < (first != second)[1:].mean() < 0.5


def test_what_stays_in_float32():
    for shape in [(), (1280,), (63, 65), (32, 64)]:
        array = jnp.ones(shape)
        assert block_axis(shape) is None
        assert to_8_bits(array, random_bits(shape, jnp.int32(0), 0), signed=True) is array
    assert [block_axis(shape) for shape in [(4096,), (3, 3, 320, 4), (1280, 640), (640, 640)]] == [0, 2, 1, 1]


def test_bytes_of_a_parameter():
    """2 1/8 bytes instead of 8: one for each moment, and a scale of four for 64 values."""
    state = jax.eval_shape(scale_by_adam_in_8_bits(*BETAS).init, {"kernel": jnp.zeros((1280, 1280))})
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.mu, state.nu)))
    assert size == 1280 * 1280 * (2 + 2 * 4 / 64)


def test_steps_like_those_of_float32():
    """Gradients of sizes from 1 to 100 in a block that change halfway: where they lead, float32 moments do to 11 %.

    Rounded to the nearest level, the second moment does not follow, and it is 24 %.
    """
    rng = np.random.default_rng(0)
    sizes, change = (10 ** rng.uniform(-1, 1, (2, 64, 64))).astype(np.float32)
    mean = 0.3 * rng.standard_normal((64, 64)).astype(np.float32)

    def walk(adam):
        def step(carry, key):
            number, x, state = carry
            noise = jax.random.normal(key, sizes.shape)
            updates, state = adam.update({"x": sizes * jnp.where(number < 600, 1, change) * (mean + noise)}, state)
            return (number + 1, x - updates["x"], state), x

        begin = {"x": jnp.zeros(sizes.shape)}
        keys = jax.random.split(jax.random.key(0), 1200)
        run = jax.jit(lambda: jax.lax.scan(step, (0, begin["x"], adam.init(begin)), keys))
        return np.asarray(run()[0][1] - run()[1][900])

    ours, exact = walk(scale_by_adam_in_8_bits(*BETAS)), walk(optax.scale_by_adam(*BETAS))
    assert np.linalg.norm(ours - exact) < 0.12 * np.linalg.norm(exact)


def test_on_a_mesh_scales_lie_beside_their_values(small_blocks, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 64)
    step = make_step(CONFIG, model_config(), make_mesh(2, 4))
    state = jax.eval_shape(step.init, {path: parameters(step.model)[path] for path in step.labels})
    places = step.shardings(state)
    assert jax.tree.structure(places) == jax.tree.structure(state)
    held = [leaf for leaf in jax.tree.leaves(places, is_leaf=is_eight_bit) if is_eight_bit(leaf)]
    split = [leaf for leaf in held if leaf.levels.spec != PartitionSpec()]
    assert len(split) > 20
    # Where scales do not divide by the mesh, they are copied.
    assert len([leaf for leaf in split if leaf.scales.spec == leaf.levels.spec]) > 0.8 * len(split)


def test_the_mesh_and_a_checkpoint_change_no_bit(small_blocks, monkeypatch, tmp_path):
    """Three steps on one device, as three on eight, as two on eight, saved, and one on four."""
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 64)
    adam, rng = scale_by_adam_in_8_bits(*BETAS), np.random.default_rng(0)
    shapes = {"a": (16, 32), "b": (3, 3, 16, 8), "c": (24,)}
    gradients = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    begin = jax.jit(adam.init)(gradients)

    def after(state, steps, fsdp):
        mesh = make_mesh(1, fsdp)
        place = make_step(CONFIG, model_config(), mesh).shardings
        update = jax.jit(adam.update, out_shardings=(None, place(state)))
        arrays, state = jax.device_put((gradients, state), (place(gradients), place(state)))
        for _ in range(steps):
            _, state = update(arrays, state)
        return state

    alone, saved_at_2 = after(begin, 3, 1), after(begin, 2, 8)
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", CheckpointConfig())) as checkpoints:
        checkpoints.save(2, saved_at_2, {})
        checkpoints.wait()
        resumed, _ = checkpoints.restore(2, saved_at_2)
    for state in (after(begin, 3, 8), after(resumed, 1, 4)):
        assert jax.tree.structure(state) == jax.tree.structure(alone)
        for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(small_blocks, tmp_path):
    changes = STAGE_1 | {"optimizer": {"warmup": 1, "momentum_dtype": "int8"}}
    command = functools.partial(place().command, changes=changes)
    with kept_programs(tmp_path):
        assert train(command(tmp_path / "whole")) == 0
        assert train(command(tmp_path / "run"), change=stop_at(2)) == 130
        assert train(command(tmp_path / "run")) == 0
    expected = saved(tmp_path / "whole")
    assert_same_bits(saved(tmp_path / "run"), expected)
    assert {str(array.dtype) for name, array in expected.items() if name.endswith("/levels")} == {"int8", "uint8"}
    assert any(name.endswith("kernel/scales") for name in expected)
