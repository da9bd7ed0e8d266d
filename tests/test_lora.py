"""LoRA: adapters of frozen kernels, which alone train, and whose sum is an ordinary kernel again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_parity
from training_case import STAGE_1, make_batch, make_step, model_config, parameters, start, train_config

from faithdiff_jax.errors import InputError
from faithdiff_jax.training.config import LoRAConfig
from faithdiff_jax.training.groups import assign_groups
from faithdiff_jax.training.lora import adapter_shapes, initial_adapter, merge_adapters, merged

SHAPES = {
    "unet.attn1.to_q.kernel": (2, 32, 16),
    "unet.attn1.to_out.kernel": (24, 16),
    "unet.attn1.to_out.bias": (16,),
    "unet.conv_in.kernel": (3, 3, 4, 16),
}
RANK, ALPHA = 4, 6.0
# Adam's step of B is then small enough for A to have had its gradient through it in the next one.
LORA_ONLY = {
    "groups": {},
    "frozen": ["*"],
    "lora": {"rank": RANK, "alpha": ALPHA, "learning_rate": 1e-2, "weight_decay": 0.0},
}


def refused(lora: LoRAConfig) -> str:
    with pytest.raises(InputError) as caught:
        adapter_shapes(lora, SHAPES)
    return str(caught.value)


def test_shapes_of_adapters():
    assert adapter_shapes(LoRAConfig(parameters=("unet.*.to_*.kernel",), rank=3), SHAPES) == {
        "lora.unet.attn1.to_q.kernel.a": (2, 32, 3),
        "lora.unet.attn1.to_q.kernel.b": (2, 3, 16),
        "lora.unet.attn1.to_out.kernel.a": (24, 3),
        "lora.unet.attn1.to_out.kernel.b": (3, 16),
    }


def test_bad_settings_are_one_line():
    assert refused(LoRAConfig(parameters=("alignment.*",))) == (
        "lora.parameters: pattern 'alignment.*' matches no parameter"
    )
    assert refused(LoRAConfig(parameters=("unet.conv_in.kernel",), rank=1)) == (
        "lora.parameters: pattern 'unet.conv_in.kernel' matches unet.conv_in.kernel (3, 3, 4, 16), not a linear kernel"
    )
    assert "matches unet.attn1.to_out.bias (16,), not a linear kernel" in refused(
        LoRAConfig(parameters=("unet.attn1.to_out.*",), rank=1)
    )
    assert refused(LoRAConfig(parameters=("unet.*.to_*.kernel",), rank=16)) == (
        "lora.rank is 16: must be below the sides of unet.attn1.to_q.kernel, 32 and 16"
    )
    adapter_shapes(LoRAConfig(parameters=("unet.*.to_*.kernel",), rank=15), SHAPES)


def test_a_kernel_cannot_train_and_be_adapted():
    groups = {"rest": {"parameters": ["unet.attn1.to_q.*"], "learning_rate": 1.0}}
    frozen = ["unet.conv_in.*", "unet.attn1.to_out.*"]
    lora = {"parameters": ["unet.attn1.to_*.kernel"], "rank": 1}
    with pytest.raises(InputError) as caught:
        assign_groups(train_config({"groups": groups, "frozen": frozen, "lora": lora}), SHAPES)
    assert str(caught.value) == ("unet.attn1.to_q.kernel: claimed by lora and by group 'rest'; freeze what LoRA adapts")


def test_adapters_are_a_group_beside_others():
    groups = {"rest": {"parameters": ["unet.conv_in.*"], "learning_rate": 1.0}}
    lora = {"parameters": ["unet.*.to_q.kernel"], "rank": 1}
    assert assign_groups(train_config({"groups": groups, "frozen": ["unet.attn1.*"], "lora": lora}), SHAPES) == {
        "unet.conv_in.kernel": "rest",
        "lora.unet.attn1.to_q.kernel.a": "lora",
        "lora.unet.attn1.to_q.kernel.b": "lora",
    }


def test_a_begins_within_its_bound_and_b_at_zero():
    a = np.asarray(initial_adapter("lora.x.kernel.a", (3, 400, 8), jax.random.key(0)))
    assert a.dtype == np.float32
    assert np.abs(a).max() <= 1 / 20
    assert np.abs(a).max() > 0.99 / 20
    assert np.isclose(a.std(), 1 / 20 / 3**0.5, rtol=0.05)
    assert not np.asarray(initial_adapter("lora.x.kernel.b", (3, 8, 400), jax.random.key(0))).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sum_of_each_layer(rng, dtype):
    kernel, a, b = (rng.standard_normal(shape, np.float32) for shape in ((2, 6, 5), (2, 6, 3), (2, 3, 5)))
    got = merged(jnp.asarray(kernel, dtype), jnp.asarray(a), jnp.asarray(b), 1.5)
    assert got.dtype == dtype
    expected = np.stack([kernel[i] + 1.5 * a[i] @ b[i] for i in range(2)])
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=1e-5 if dtype == "float32" else 0.1)
    np.testing.assert_allclose(merged(kernel, a, b, 1.5), expected, atol=1e-5)


def test_all_parameters_come_out_of_a_merge(rng):
    lora = LoRAConfig(parameters=("unet.*.to_q.kernel",), rank=2, alpha=6)
    plain = {path: rng.standard_normal(shape, np.float32) for path, shape in SHAPES.items()}
    adapters = {path: rng.standard_normal(shape, np.float32) for path, shape in adapter_shapes(lora, SHAPES).items()}
    whole = merge_adapters(lora, plain | adapters)
    assert whole.keys() == plain.keys()
    assert {path for path in plain if whole[path] is not plain[path]} == {"unet.attn1.to_q.kernel"}
    update = 3 * adapters["lora.unet.attn1.to_q.kernel.a"] @ adapters["lora.unet.attn1.to_q.kernel.b"]
    assert_parity(whole["unet.attn1.to_q.kernel"], plain["unet.attn1.to_q.kernel"] + update, 1e-6)
    assert merge_adapters(None, plain) == plain


@functools.cache
def trained():
    """Before each of three steps: trained parameters and the frozen ones; and the losses that each step saw."""
    step = make_step(train_config(LORA_ONLY, ema=None, rematerialisation="none"), model_config())
    state, frozen = start(step)
    seen = []
    for _ in range(3):
        before = jax.device_get(state["trained"])
        state, metrics = step.run(state, frozen, make_batch(0))
        seen.append((before, np.asarray(metrics["losses"])))
    return step, seen, jax.device_get(frozen), jax.device_get(state)


@functools.cache
def plain_losses():
    """The compiled losses of the model without LoRA, from all its parameters."""
    step = make_step(train_config(STAGE_1, rematerialisation="none"), model_config())
    batch = make_batch(0)
    loss = jax.jit(lambda params, batch: step.loss({}, params, batch, step._draw(batch, 0))[1])
    return lambda params: loss(params, batch)


def test_training_begins_with_the_plain_model():
    _, seen, _, _ = trained()
    assert_parity(seen[0][1], plain_losses()(parameters(model_config())), 1e-6)


def test_merged_kernels_are_what_was_trained():
    step, seen, frozen, _ = trained()
    for adapters, losses in seen[1:]:
        whole = merge_adapters(step.config.lora, frozen | adapters)
        assert_parity(losses, plain_losses()(whole), 1e-5)
    assert np.abs(seen[2][1] - seen[0][1]).max() > 1e-3


def test_only_adapters_move():
    step, seen, frozen, state = trained()
    kernels = [path for path in parameters(model_config()) if "attn" in path and ".to_" in path and "kernel" in path]
    kernels = [path for path in kernels if path.startswith("unet.")]
    wanted = {f"lora.{path}.{side}" for path in kernels for side in "ab"}
    assert wanted == state["trained"].keys() == set(step.labels)
    assert sum(leaf.size for leaf in jax.tree.leaves(state["optimizer"]) if leaf.ndim) == 2 * sum(
        array.size for array in state["trained"].values()
    )
    for path, array in parameters(model_config()).items():
        np.testing.assert_array_equal(frozen[path], array)
    first, second, third = (before for before, _ in seen)
    for path in wanted:
        if path.endswith(".a"):
            # Its gradient is a product with B, which is zero at first.
            np.testing.assert_array_equal(second[path], first[path])
        else:
            assert not first[path].any()
            assert second[path].any()
        assert not np.array_equal(third[path], second[path])
